"""The forms of the files that others write: their keys, types and bounds, as files.check_form reads them.

A key with ? may be missing. A key that is not named is ignored, except where `str: NOTHING` forbids it.
"""
import cli

from files import NOTHING, Number

# config.json of a transformer: the fields of model.WanConfig. Absurd ones are refused, not built.
CONFIG = {
    "model_type": {"t2v", "i2v", "flf2v", "ti2v"},
    "dim": range(2, 20_001), "ffn_dim": range(1, 100_001), "freq_dim": range(2, 10_001, 2),
    "in_dim": range(1, 1001), "out_dim": range(1, 1001),
    "num_heads": range(1, 1001), "num_layers": range(1, 201),
    "text_len?": range(1, 10_001), "text_dim?": range(1, 100_001), "eps?": Number(0, 1),
    "use_clip?": (bool, None)}

# What encoding and sampling need of it. They look at the kind of model themselves.
KIND = {"model_type": str, "text_len?": CONFIG["text_len?"]}

# config.json of a reward model, written by train_pavrm.py.
ANNOTATIONS = ("physics_quality", "human_quality", "text_alignment", "blur_quality")
LABELS = (*ANNOTATIONS, "motion_quality")  # motion_quality is physics_quality AND human_quality
REWARD_CONFIG = {**CONFIG, "pavrm": {
    "num_blocks": CONFIG["num_layers"], "labels": [set(LABELS)], "pool": {"query", "mean", "max"},
    "num_queries": range(1, 10_001), "use_clip": bool, str: NOTHING}}

# sampling.json: the settings of a model for which the published ones are not right. Never a path.
SAMPLING = {
    "size?": [cli.SIDE, cli.SIDE], "frames?": cli.FRAMES, "fps?": cli.FPS, "solver_steps?": range(1, 1001),
    "shift?": cli.SHIFT, "guidance?": cli.GUIDANCE, "prompt?": [str], "negative_prompt?": str, str: NOTHING}

# A line of index.jsonl, written by data.py. The shape is that of the latents.
ENTRY = {
    "file": str, "source_id": str, "short_caption": str, "long_caption?": str,
    "labels": {**{f"{name}?": object for name in ANNOTATIONS}, str: NOTHING},
    "pair_id?": (str, int, None), "shape": [range(1, 10_001)] * 4, "model_type?": CONFIG["model_type"],
    "fps?": cli.FPS, "frames?": cli.FRAMES, "video_path?": (str, None)}

# The meta file of a clip that the published code has encoded.
ARRAYS = {  # the keys under which it names the clip's arrays; the first one that is there counts
    "latents": ("video_vae_latent_path", "vae_latent_path", "latents_path"),
    "condition": ("f1_black_path", "latents_condition_path"),
    "clip": ("image_embeds", "imgclip_path"),
    "text_short": ("save_textshort_path", "textshort_path", "text_en_path"),
    "text_long": ("textlong_path", "text_en_path", "save_textshort_path", "textshort_path")}
META = {
    "source_id?": (str, int, None), "pair_id?": (str, int, None), "prompt?": (str, None),
    "short_caption?": (str, None), "long_caption?": (str, None),
    **{f"{key}?": (str, None) for keys in ARRAYS.values() for key in keys}}

# A line of log.jsonl, written by the training scripts: of a step, or of an evaluation.
LOG = {"step": range(10**9), "evaluation?": dict, "loss_by_timestep?": dict, "k?": [int]}

# scores.json, written by score.py: each clip's rewards by label, one for each timestep.
SCORES = {
    "reward_model": str, "timesteps": [Number(0, 1000)], "measures?": {str: {str: {str: (float, None)}}},
    "scores": [{"name": str, "reward": float, "rewards": {str: [float]}}]}

# config.json of an ONNX network, written by onnx_net.py: its nodes in an order in which they can be computed.
# The attributes' forms are beside the operators (onnx_operators.py).
ONNX_GRAPH = {
    "opset": range(7, 29), "inputs": [str], "outputs": [str],
    "nodes": [{"operator": str, "inputs": [str], "outputs": [str], "attributes": dict}]}
