"""temperament: fine-tune foundation models, keep what they knew, and see what was gained and what was lost."""
