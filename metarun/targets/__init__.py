"""What tasks ask for: losses, scores and rows of each kind of target."""
