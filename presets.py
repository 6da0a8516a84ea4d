"""Known models, and what suits a dataset, as flags of `train.py`."""

from typing import Any

# Known models as flags. What a preset says wins over the dataset's defaults, flags win over it.
# The classics see images as their papers do: one view of the backbone's own size.
CLASSIC = {"img_size": None, "views": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "resnet-transformer": {},
    "show-and-tell": {
        **CLASSIC, "cnn_backbone": "inception_v3", "grid": 1, "decoder": "lstm", "d_model": 512,
        "fc_dim": 512, "n_decode": 1, "dropout": 0.3, "lr": 2e-3, "epochs": 15,
    },
    "cnn-rnn": {
        **CLASSIC, "dataset": "coco", "cnn_backbone": "resnet50", "grid": 1, "decoder": "lstm",
        "d_model": 256, "fc_dim": 512, "n_decode": 1, "dropout": 0.5,
    },
    "show-attend-tell": {
        **CLASSIC, "cnn_backbone": "resnet101", "decoder": "attention-lstm", "d_model": 512,
        "fc_dim": 512, "n_decode": 1, "dropout": 0.5,
    },
}  # fmt: skip
# What a dataset changes of the fields' defaults; flags and presets win over it.
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    # A finer grid, and mirrored images: few photographs, and a cache of 5 GB has room. COCO's would
    # take 93 GB.
    "flickr8k": {"img_size": 320, "views": 2},
    "shapes": {
        "cnn_backbone": "tiny",
        "cnn_weights": "none",
        "augment": False,
        "d_model": 64,
        "n_decode": 2,
        "n_head": 4,
        "fc_dim": 256,
        "dropout": 0.0,  # drawings are endless: nothing to overfit, and dropout blurs relations
        "epochs": 6,
        "batch_size": 16,
        "lr": 3e-3,
        "min_count": 1,
        "label_smoothing": 0.0,
        "workers": 0,
    },
}
