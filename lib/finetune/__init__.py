"""Fine-tuning of a pruned model with its zeros kept, on transformers' Trainer and peft."""
