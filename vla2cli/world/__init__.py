"""A drawn world of captioned clips with sound, true by construction."""
