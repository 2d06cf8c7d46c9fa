import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from dte_lab.world import wide as W, train_decoder
train_decoder.main(Path(sys.argv[1]), Path("dte_lab/weights/small"), W.load(Path("cache/wide")), steps=int(sys.argv[2]), minutes=float(sys.argv[3]), batch_size=32)
