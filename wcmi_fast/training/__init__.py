"""The trainer, its settings, checkpoints and run folders."""

from wcmi_fast.training.config import ClassifierConfig, EncoderConfig, HeadConfig
from wcmi_fast.training.encoder import train_encoder
from wcmi_fast.training.evaluation import accuracy
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.supervised import train_classifier, train_head

__all__ = [
    "ClassifierConfig",
    "EncoderConfig",
    "HeadConfig",
    "RunFolder",
    "accuracy",
    "train_classifier",
    "train_encoder",
    "train_head",
]
