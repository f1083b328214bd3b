"""What tensors are called: PEFT's names in adapter files, and those of what methods put beside them. No torch here.

A name is PEFT's prefix, the path of a layer in the base model, and one of the ends below.
"""

PREFIX = "base_model.model."

# LoRA's factors A [r, in] and B [out, r], and DoRA's magnitudes [out]
A, B, M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
FACTORS = (A, B)

# a frozen change of the base model, + base_B base_A x: base_A [n, in], base_B [out, n]
BASE_A, BASE_B = ".base_A.weight", ".base_B.weight"
BASE = (BASE_A, BASE_B)
# a core between the factors, s B R A x: R [r, r]
CORE = ".lora_R.weight"
# a second adapter with the first one's scale: other_A [r, in], other_B [out, r]
OTHER_A, OTHER_B = ".other_A.weight", ".other_B.weight"
OTHER = (OTHER_A, OTHER_B)
# softmax over (own, other), for each token [2, in]
ROUTER = ".router.weight"
SIDES = (*BASE, CORE, *OTHER, ROUTER)
# of the whole model: the second adapter's weight, fixed [] or by the similarity of a text to anchors [n, hidden]
ANCHORS, MIX = "mix.anchors", "mix.weight"

# IA3's vector of a layer: [out, 1] on its output, [1, in] on its input where that is a feed-forward layer
IA3 = ".ia3_l"

# what a tensor's axes are, by the end of its name; those of any other name are "other"
ROLES = {
    A: ("rank", "in"),
    B: ("out", "rank"),
    M: ("out",),
    BASE_A: ("rank", "in"),
    BASE_B: ("out", "rank"),
    CORE: ("rank", "rank"),
    OTHER_A: ("rank", "in"),
    OTHER_B: ("out", "rank"),
}

# after a factor's name: which of its ranks a client sends
CHOSEN = ".chosen"


def is_side(name: str) -> bool:
    """Tell whether a tensor lies beside PEFT's adapter and does not belong to it."""
    return name in (ANCHORS, MIX) or (name.startswith(PREFIX) and name.endswith(SIDES))


def beside(name: str) -> str:
    """Return the name of the second adapter's tensor that lies beside one of the first's."""
    return name.replace(".lora_", ".other_")


def rank_axis(name: str) -> int | None:
    """Return the axis of a factor, A or B, that counts ranks; None for any other tensor."""
    end = next((end for end in FACTORS if name.endswith(end)), None)
    return ROLES[end].index("rank") if end else None
