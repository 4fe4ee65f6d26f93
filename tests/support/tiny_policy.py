"""A two-layer float64 transformer that runs on a packed forest or on a single trajectory."""

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, HIDDEN, HEADS, LAYERS, POSITIONS = 50, 16, 2, 2, 128


class TinyPolicy(nn.Module):
    """Its weights are large enough that every token's gradient depends on all of its path."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.token = weight(VOCABULARY, HIDDEN)
        self.position = weight(POSITIONS, HIDDEN)
        self.query_key_value = nn.ParameterList([weight(3, HIDDEN, HIDDEN) for _ in range(LAYERS)])
        self.up = nn.ParameterList([weight(HIDDEN, 2 * HIDDEN) for _ in range(LAYERS)])
        self.down = nn.ParameterList([weight(2 * HIDDEN, HIDDEN) for _ in range(LAYERS)])

    def forward(self, token: Tensor, position: Tensor, exits: Tensor) -> Tensor:
        """Logits [T, V]; all arguments [T]."""
        index = torch.arange(len(token))
        mask = (index <= index[:, None]) & (index[:, None] < exits)
        hidden = self.token[token] + self.position[position]
        for projections, up, down in zip(self.query_key_value, self.up, self.down, strict=True):
            query, key, value = (
                (hidden @ projection).view(len(token), HEADS, -1).transpose(0, 1)
                for projection in projections
            )
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            hidden = functional.layer_norm(hidden + mixed.transpose(0, 1).flatten(1), (HIDDEN,))
            hidden = functional.layer_norm(hidden + functional.gelu(hidden @ up) @ down, (HIDDEN,))
        return hidden @ self.token.T

    def log_probs_and_entropy(
        self, token: Tensor, position: Tensor, exits: Tensor, source: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each token's log-prob given its path and its distribution's entropy: [T]; 0 if source is -1."""
        log_probs = self(token, position, exits).log_softmax(-1)[source]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        log_prob = log_probs[torch.arange(len(token)), token]
        return torch.where(source >= 0, log_prob, 0.0), torch.where(source >= 0, entropy, 0.0)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat(
            [gradient.flatten() for gradient in torch.autograd.grad(loss, list(self.parameters()))]
        )
