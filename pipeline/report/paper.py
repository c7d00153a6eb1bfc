"""The numbers of Ho, Jain and Abbeel 2020 (arXiv 2006.11239v2) that stand beside ours, as the paper prints them."""

STEPS = 800_000  # App. B, CIFAR-10

# Table 1, row L_simple: CIFAR-10, 50,000 samples against the training set, NLL of the test set in bits/dim.
ROW = {"fid": "3.17", "is_mean": "9.46 ± 0.11", "nll_bpd": "≤ 3.75", "n": "50,000"}

# Table 4: {k = T - t + 1: (rate in bits/dim, RMSE on the scale 0 to 255)}, CIFAR-10, test set.
TABLE_4 = {
    1000: (1.77581, 0.95136),
    900: (0.11994, 12.02277),
    800: (0.05415, 18.47482),
    700: (0.02866, 24.43656),
    600: (0.01507, 30.80948),
    500: (0.00716, 38.03236),
    400: (0.00282, 46.12765),
    300: (0.00081, 54.18826),
    200: (0.00013, 60.97170),
    100: (0.00000, 67.60125),
}
