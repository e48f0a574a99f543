"""Evaluation on long documents: tasks whose answers are generated, perplexity, and reports beside the dense model."""
