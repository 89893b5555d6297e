"""Code about transformers and PEFT that the methods share."""
