"""Text models."""

import torch
from torch import Tensor, nn


class CharRNN(nn.Module):
    """Two stacked LSTMs with attention over time; a window of characters predicts the next one.

    The architecture of textgenrnn: the attention reads the embedding and both LSTMs' outputs.
    """

    def __init__(self, num_classes: int, embedding: int = 100, hidden: int = 128) -> None:
        super().__init__()
        width = embedding + 2 * hidden
        self.embedding = nn.Embedding(num_classes, embedding)
        self.rnn_1 = nn.LSTM(embedding, hidden, batch_first=True)
        self.rnn_2 = nn.LSTM(hidden, hidden, batch_first=True)
        self.att = nn.Parameter(torch.randn(width) / width**0.5)
        self.output = nn.Linear(width, num_classes)

    def forward(self, characters: Tensor) -> Tensor:
        """Map character indices (n, window) to scores of the next character (n, num_classes)."""
        embedded = self.embedding(characters)
        first, _ = self.rnn_1(embedded)
        second, _ = self.rnn_2(first)
        states = torch.cat([embedded, first, second], dim=-1)
        attention = torch.softmax(states @ self.att, dim=1)
        return self.output((attention.unsqueeze(1) @ states).squeeze(1))


def charrnn(num_classes: int) -> nn.Module:
    """Character model of two LSTMs with attention over time (textgenrnn), 0.4M parameters."""
    return CharRNN(num_classes)
