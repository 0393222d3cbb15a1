"""Front-ends: normalised frames in, visual tokens out."""
