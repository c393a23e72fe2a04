mean = 0.13       # scores are normalised: (score - mean) / deviation
deviation = 0.05


def score(video, clip):                     # video (F, 3, H, W), RGB in [-1, 1], with gradient
    return (video + 1).mean() / 2           # one number
