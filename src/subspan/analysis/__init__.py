"""What matrices of a training run look like: spectra, and how fast finders are on them (extra [train])."""
