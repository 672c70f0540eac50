"""Models as graphs that other programs run: of torch.export, and ONNX.

The graphs are of the model's own layers and parameters. Only what a forward resolves on the host by the contents of its
batch is said by tensors here: masks by positions, rotations by two real numbers, and experts that all see all tokens.
"""
