"""peft_ops inside other libraries' models and files."""
