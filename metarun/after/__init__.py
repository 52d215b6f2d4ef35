"""After a run: its learner, further tests of it, predictions, and what other programs can load."""
