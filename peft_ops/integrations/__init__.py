"""What others save and run: PEFT's folders, the (IA)^3 authors' checkpoints."""
