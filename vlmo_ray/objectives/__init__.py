"""The pre-training objectives as functions of tensors."""
