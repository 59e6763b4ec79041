import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two torch threads are slower than one on small nets
os.environ.setdefault("MPLBACKEND", "Agg")
