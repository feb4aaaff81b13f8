"""Maps the tensors of a checkpoint to the parameters of a model, and converts them while loading."""
