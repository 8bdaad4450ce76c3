"""The rules that the run-config chooses: aggregation of logits, scores of samples, losses of the LoRA update."""
