"""Reading, generating, downloading and checking of data, and their plain forms."""
