"""Speech: audio as models hear it, transcripts, how they are normalised, and what is measured of them."""
