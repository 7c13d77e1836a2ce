"""`onnxsqueeze serve`: a deployed folder behind HTTP, by the Open Inference Protocol and by /classify.

folder      where the versions lie              batching    rows that share a call, and the thread that makes it
model       one open version, checked           protocol    tensors from and to the Open Inference Protocol
rows        what the model can take             classify    texts in, labels, values or vectors out
repository  the version that is served          metrics     what /metrics shows
answer      answers, refusals, bodies           app         the endpoints
connection  one client's connection             server      one process: start, serve, drain
workers     several processes on one port       settings    what the command line sets, and limits
start       from the command line to either
"""
