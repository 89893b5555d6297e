"""What the methods share about transformers and PEFT."""
