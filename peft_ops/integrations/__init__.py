"""What others save and run: PEFT's models and folders, the (IA)^3 authors' checkpoints."""
