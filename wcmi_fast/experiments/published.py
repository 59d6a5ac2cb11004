"""What the paper reports, to stand beside what is measured (spec section 7)."""

from __future__ import annotations

# Natural and adversarial accuracy in %, means over 4 trials, of MLP and of linear heads, by the
# representation and how its head was trained. Under PGD with the settings of spec section 6.
Accuracies = tuple[float, float]
PUBLISHED: dict[str, dict[tuple[str, str], dict[str, Accuracies]]] = {
    "cifar10": {
        ("standard", "standard"): {"mlp": (58.77, 0.22), "linear": (47.01, 0.15)},
        ("standard", "robust"): {"mlp": (29.75, 15.08), "linear": (22.79, 10.28)},
        ("worst_case", "standard"): {"mlp": (62.54, 14.06), "linear": (50.29, 10.98)},
        ("worst_case", "early_stop"): {"mlp": (51.59, 27.53), "linear": (48.55, 13.52)},
        ("worst_case", "robust"): {"mlp": (52.34, 31.52), "linear": (43.55, 25.15)},
        ("supervised", "standard"): {"mlp": (86.33, 0.07), "linear": (86.36, 0.02)},
        ("supervised", "robust"): {"mlp": (70.71, 40.50), "linear": (72.44, 39.98)},
    },
    "mnist": {
        ("standard", "standard"): {"mlp": (96.96, 0.00), "linear": (84.88, 0.00)},
        ("standard", "robust"): {"mlp": (44.99, 16.70), "linear": (11.35, 11.35)},
        ("worst_case", "standard"): {"mlp": (96.67, 9.97), "linear": (82.10, 3.69)},
        ("worst_case", "early_stop"): {"mlp": (94.68, 12.79), "linear": (77.72, 4.73)},
        ("worst_case", "robust"): {"mlp": (95.05, 60.64), "linear": (73.99, 30.55)},
        ("supervised", "standard"): {"mlp": (99.13, 0.45), "linear": (99.13, 0.00)},
        ("supervised", "robust"): {"mlp": (99.25, 95.73), "linear": (99.21, 95.29)},
    },
    "fashion_mnist": {
        ("standard", "standard"): {"mlp": (89.58, 0.00), "linear": (85.93, 0.00)},
        ("standard", "robust"): {"mlp": (48.61, 14.95), "linear": (10.00, 10.00)},
        ("worst_case", "standard"): {"mlp": (90.45, 5.38), "linear": (87.37, 18.20)},
        ("worst_case", "early_stop"): {"mlp": (81.66, 29.71), "linear": (86.27, 23.40)},
        ("worst_case", "robust"): {"mlp": (84.31, 70.44), "linear": (81.05, 61.33)},
        # The natural accuracy of the linear one is likely a slip of the print.
        ("supervised", "standard"): {"mlp": (92.09, 0.00), "linear": (85.93, 0.00)},
        ("supervised", "robust"): {"mlp": (87.94, 77.59), "linear": (88.05, 77.15)},
    },
    "svhn": {
        ("standard", "standard"): {"mlp": (50.15, 0.00), "linear": (38.94, 0.00)},
        ("standard", "robust"): {"mlp": (19.59, 19.59), "linear": (19.59, 19.59)},
        ("worst_case", "standard"): {"mlp": (74.32, 26.29), "linear": (58.37, 21.62)},
        ("worst_case", "early_stop"): {"mlp": (71.85, 29.59), "linear": (54.76, 25.00)},
        ("worst_case", "robust"): {"mlp": (68.25, 40.23), "linear": (49.04, 30.56)},
        ("supervised", "standard"): {"mlp": (91.97, 9.77), "linear": (91.33, 9.29)},
        ("supervised", "robust"): {"mlp": (90.14, 65.35), "linear": (89.60, 64.48)},
    },
}
