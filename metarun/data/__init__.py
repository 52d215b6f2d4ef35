"""Reading, generating, downloading and checking of data sets."""
