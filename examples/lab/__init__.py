"""What exists for numbers: data sets, trainings side by side, studies, evaluation, pictures, a benchmark.

Its one command line is `python -m lab`, in the folder examples/. To see how a training with CGC is written, read
train_imagenette.py there instead.
"""
