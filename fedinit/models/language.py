"""Text models."""

import torch
from torch import Tensor, nn

from fedinit.errors import RequestError


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


class CharLM(nn.Module):
    """Words read by their characters; an LSTM over words predicts each next one.

    Kim et al. 2016 (Character-Aware Neural Language Models), the small model: per character an
    embedding of 15, convolutions of widths 1 to 6 with 25 filters for each unit of width, tanh and
    the maximum over the word, one highway layer, two LSTMs, a softmax over words.
    """

    def __init__(self, num_classes: int, hidden: int, dropout: float) -> None:
        super().__init__()
        width = sum(_FILTERS * each for each in _WIDTHS)
        self.characters = nn.Embedding(_BYTES, _CHARACTER, padding_idx=0)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(_CHARACTER, _FILTERS * each, each) for each in _WIDTHS
        )
        self.transform = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.lstm = nn.LSTM(width, hidden, 2, batch_first=True, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, num_classes)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.05, 0.05)  # as in the paper
        nn.init.zeros_(self.characters.weight[0].data)
        nn.init.constant_(self.gate.bias, -2.0)  # at first the highway carries words as they are

    def forward(self, words: Tensor) -> Tensor:
        """Map words (n, length, bytes) to scores of each next word (n, num_classes, length)."""
        n, length, size = words.shape
        spelled = self.characters(words.reshape(-1, size)).transpose(1, 2)
        read = torch.cat([torch.tanh(each(spelled)).amax(2) for each in self.convolutions], 1)
        gate = torch.sigmoid(self.gate(read))
        read = gate * torch.relu(self.transform(read)) + (1 - gate) * read
        states, _ = self.lstm(read.view(n, length, -1))
        return self.output(self.dropout(states)).transpose(1, 2)


_BYTES, _CHARACTER, _FILTERS, _WIDTHS = 256, 15, 25, range(1, 7)


def charlm(num_classes: int, hidden: int = 300, dropout: float = 0.5) -> nn.Module:
    """Word model that reads characters (Kim et al. 2016, small), 3.8M weights for 5,000 words."""
    return CharLM(num_classes, hidden, dropout)


def distilgpt2(
    num_classes: int, layers: int = 6, heads: int = 12, width: int = 768, positions: int = 1024
) -> nn.Module:
    """DistilGPT2 (Sanh et al. 2019): a GPT-2 of 6 layers over sub-words, 82M parameters.

    Its head is the embedding of the sub-words, which GPT-2 ties to the softmax: `trainable: head`
    trains that one matrix, as the study's code does.

    Args:
        num_classes: number of sub-words.
        layers, heads, width, positions: its size.

    Raises:
        RequestError: transformers is not installed.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise RequestError(
            "model: distilgpt2 needs transformers: pip install 'fedinit[language]'"
        ) from None

    config = GPT2Config(
        vocab_size=num_classes,
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        n_positions=positions,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    network = GPT2LMHeadModel(config)
    # as a hook, so that names are those of the published weights
    network.register_forward_hook(lambda _module, _inputs, found: found.logits.transpose(1, 2))
    return network
