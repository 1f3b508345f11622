"""What families share: the modules that decoders are made of, and what they compute."""
