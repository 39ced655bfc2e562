"""PyTorch checkpoints to JAX, without torch.

Public names:
  `converters.convert.convert`             a file, folder or hub repository into a model folder
  `converters.names.to_params`             a state dict in memory into a parameter tree
  `converters.layouts.to_original`         keys of other layouts (diffusers, transformers) renamed
  `converters.layouts.infer_config`        the sizes of a model, read off its tensors
  `converters.torch_file.open_torch_file`  a `.pt` / `.pth` file, memory-mapped, no pickle code run
"""
