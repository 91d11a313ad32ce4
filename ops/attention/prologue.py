"""What is done to Q and K before they are quantized, in the same pass over memory."""

from dataclasses import dataclass

import torch

HEAD, TOKEN = "head", "token"
NORMS = (HEAD, TOKEN)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEFAULT_EPS = 1e-6
# Of a custom operation's schema.
ARGUMENTS = (
    "str norm='', float eps=0.0, Tensor? q_weight=None, Tensor? k_weight=None, SymInt first=0, "
    "Tensor? cos=None, Tensor? sin=None"
)


@dataclass(frozen=True)
class Prologue:
    """Steps between the projections q and k [B, H, L, D] and attention; absent ones are None.

    norm: x / sqrt(mean(x²) + eps), the mean over a "head" (D channels, as in Qwen-Image) or over
    all heads of a "token" (H · D channels, as in Wan). Then q · q_weight and k · k_weight: [D], or
    [H · D] after the norm of a token (of k its own H). A weight may have two rows, [2, ·]: the
    first one is for tokens before `first`, a text's that stands before an image.
    cos, sin: [L, D / 2], rows for all tokens of q and of k: channels (x, y) at 2i and 2i + 1 become
    (x · cos − y · sin, x · sin + y · cos). Of the host's freqs [..., D / 2, 2, 2] these are
    [..., 0, 0] and [..., 1, 0].
    Tensors are contiguous bf16, fp16 or fp32. All is computed in float32, and never rounded to 16
    bits between.
    """

    norm: str | None = None
    eps: float = DEFAULT_EPS
    q_weight: torch.Tensor | None = None
    k_weight: torch.Tensor | None = None
    first: int = 0
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None

    def weight(self, name: str) -> torch.Tensor | None:
        """Return the weight of "q" or "k"."""
        return self.q_weight if name == "q" else self.k_weight

    @property
    def arguments(self) -> tuple:
        """Return the steps as a custom operation takes them, in the order of ARGUMENTS.

        Empty for NOTHING: torch.compile makes symbols of numbers that it finds in objects.
        """
        if self is NOTHING:
            return ()
        weights = (self.q_weight, self.k_weight)
        return (self.norm or "", float(self.eps), *weights, self.first, self.cos, self.sin)

    def check(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Raise ValueError or TypeError when the steps do not fit q and k."""
        if self.norm not in (None, *NORMS):
            raise ValueError(f"attention: norm is {self.norm!r}; known are {NORMS}, None")
        d, tokens = q.shape[3], max(q.shape[2], k.shape[2])
        for name, x in (("q", q), ("k", k)):
            width = x.shape[1] * d if self.norm == TOKEN else d
            _check_tensor(f"{name}_weight", self.weight(name), ((width,), (2, width)), q.device)
        if (self.cos is None) != (self.sin is None):
            raise ValueError("attention: cos and sin come together; one of them is missing")
        if self.cos is not None:
            if d % 2 or self.cos.dim() != 2 or self.cos.shape[0] < tokens:
                raise ValueError(
                    f"attention: cos is {list(self.cos.shape)}; [{tokens} or more, {d} / 2] is "
                    "wanted, a row for each token and a column for each pair of channels"
                )
            shape = (self.cos.shape[0], d // 2)
            _check_tensor("cos", self.cos, (shape,), q.device)
            _check_tensor("sin", self.sin, (shape,), q.device)


def _check_tensor(name: str, value, shapes, device: torch.device) -> None:
    if value is None:
        return
    if value.device != device:
        raise ValueError(f"attention: {name} is on {value.device}, q on {device}")
    if tuple(value.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"attention: {name} is {list(value.shape)}; {wanted} is wanted")
    if value.dtype not in DTYPES:
        raise TypeError(f"attention: {name} is {value.dtype}; cast it to a float of 16 or 32 bits")
    if not value.is_contiguous():
        raise ValueError(f"attention: {name} is not contiguous; call .contiguous() on it")


NOTHING = Prologue()


def of_arguments(
    norm="", eps=0.0, q_weight=None, k_weight=None, first=0, cos=None, sin=None
) -> Prologue:
    """Return the prologue whose `arguments` these are: NOTHING itself where there are no steps."""
    if not norm and q_weight is None and k_weight is None and cos is None:
        return NOTHING
    return Prologue(norm or None, eps, q_weight, k_weight, first, cos, sin)
