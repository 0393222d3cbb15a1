"""Files in, frames out: sampling, decoding, and the processes it happens in."""
