"""The method as ONNX graphs, for programs without torch: `dte export --onnx DIR`."""
