import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from dte_lab.world import wide as W, train_tower, wide_batches
shares=wide_batches.Shares(dictionary=0.4,on_white=True)
train_tower.main(Path(sys.argv[1]), Path("dte_lab/weights/small"), W.load(Path("cache/wide")), steps=int(sys.argv[2]), minutes=float(sys.argv[3]), batch_size=128, shares=shares, learning_rate=float(sys.argv[4]), muon_learning_rate=float(sys.argv[5]))
