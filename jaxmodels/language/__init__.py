"""Language models: encoders, encoder-decoders, and how text is generated from them."""
