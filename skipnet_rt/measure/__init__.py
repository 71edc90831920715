"""What is measured and shown of a compiled network: timings, baselines, evaluation, figures, diagnosis."""
