"""What a registration is made of: stages, and what they measure, step and smooth with."""
