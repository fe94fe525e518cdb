"""Read SSPA with the figure beside you: one drawn picture and three labels through every box, with shapes and numbers.

    python walk.py        seconds; nothing is trained: prompts are "a photo of a", GDMA adds nothing, QSM is random
"""
import torch
import torch.nn.functional as F

import embed
import scenes
import sspa


def show(symbol, tensor, what):
    print(f"{symbol:<6}{str(list(tensor.shape)):<16}{what}")


photo = ("test", 1)
truth = [name for name, present in zip(scenes.NAMES, scenes.labels_of(*photo), strict=True) if present]
names = [*truth, "boat"]
print(f"picture {photo} shows: {', '.join(truth)}. Labels asked for: {', '.join(names)}\n")

config = sspa.Config(tune_image="none", impl="reference", cache=None)
clip = embed.load_clip("scenes")
labels = sspa.labels_of(config, clip, names)
model = sspa.SSPA(config, clip.model, labels, seed=0)

with torch.no_grad():
    # image encoder
    x0, X = sspa.image_features(clip.model.visual, embed.load_photo(clip, photo)[None])
    x0 = F.normalize(x0, dim=-1)
    X = F.normalize(X, dim=-1)
    show("x0", x0, "the whole image                                   image_features")
    show("X", X, "its regions, 8 x 8 patches")

    # knowledge-aware prompts
    print(f"      {labels.texts[0]!r}")
    T_ka = model.knowledge
    show("T_ka", T_ka, "KAP: that sentence through the text encoder        knowledge_texts")

    # context-aware and global prompts
    T_g, E_ca = model.prompts()
    show("T_g", T_g, "global prompts: 'X X X X boat.', X learnt          encode_prompts_reference")
    show("E_ca", E_ca, "CAP: the same with other X")

    # dynamic semantic filtering
    T_ca, attention = model.filter(E_ca, X)
    show("A", attention, "DSF: softmax over regions                          DynamicSemanticFiltering")
    for label, name in enumerate(names):
        weight, region = attention[0, label].max(0)
        print(f"      {name} attends most to row {region // 8}, column {region % 8}: {weight:.3f} (all: {1 / 64:.3f})")
    show("T_ca", T_ca, "A X: what each label gathers from the image")

    # quaternion semantic modelling
    T_uf = model.fuse(T_ka, T_ca, x0)
    show("T_uf", T_uf, "QSM: 0 + T_ka i + T_ca j + x0 k, two layers        quaternion_linear_reference")

    # gated dual-modal alignment
    T_fn, X_fn, label_gate, region_gate = model.align(T_uf, X)
    show("T_fn", T_fn, "GDMA, labels attend to regions                     gated_attention_reference")
    show("g", label_gate, f"its gate for each channel; mean {label_gate.mean():.3f}")
    show("X_fn", X_fn, "GDMA, regions attend to labels")

    # branches
    scale = model.global_log_scale.exp()
    s_G = scale * x0 @ T_g.T + model.global_bias
    s_R = sspa.soft_aggregate_reference(T_fn, X_fn, model.temperature, model.regional_log_scale.exp())
    show("s_G", s_G, f"global branch: 20 cos(x0, T_g)        {[round(s, 2) for s in s_G[0].tolist()]}")
    show("s_R", s_R, f"regional branch: soft aggregator      {[round(s, 2) for s in s_R[0].tolist()]}")

    # losses
    targets = torch.tensor([[int(name in truth) for name in names]])
    L_G = sspa.asymmetric_loss_reference(s_G, targets)
    L_R = sspa.asymmetric_loss_reference(s_R + model.regional_bias, targets)
    print(f"\ntargets {targets.tolist()[0]}; losses {L_G:.3f} (global), {L_R:.3f} (regional)")
    assert torch.allclose(model(x0, X, targets), L_G + L_R)  # SSPA.forward computes the same
