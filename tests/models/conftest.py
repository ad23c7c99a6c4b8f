"""Small quantizers and catalogues for the tests of `models`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from models.network import DecoderNetwork, EncoderNetwork, NetworkConfig
from models.residual import ResidualQuantizer
from models.template import TextTemplate
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.tokenizer import TokenizerParts

# Threads of several processes on few cores wait for each other; the tests are small enough for one.
THREADS = 1


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(THREADS, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="session")
def text_encoder() -> TextEncoder:
    return TextEncoder(TextEncoderConfig())


@pytest.fixture
def make_quantizer() -> Callable[..., ResidualQuantizer]:
    """A residual quantizer with random codebooks, each level finer."""

    def make(sizes: tuple[int, ...] = (32, 32, 32), dimension: int = 8, seed: int = 3) -> ResidualQuantizer:
        quantizer = ResidualQuantizer(sizes, dimension)
        source = torch.Generator().manual_seed(seed)
        for level, codebook in enumerate(quantizer.codebooks):
            codebook.data = torch.randn(codebook.shape, generator=source) / 2**level
        quantizer.initialised.fill_(value=True)
        return quantizer

    return make


@pytest.fixture
def make_parts(make_quantizer: Callable[..., ResidualQuantizer]) -> Callable[..., TokenizerParts]:
    """Parts of a tokenizer of embeddings."""

    def make(
        widths: tuple[int, ...] = (12, 8), encoder: TextEncoder | None = None, sizes: tuple[int, ...] = (32, 32, 32)
    ) -> TokenizerParts:
        torch.manual_seed(5)
        config = NetworkConfig(widths)
        return TokenizerParts(
            family="rqvae",
            template=TextTemplate(),
            text_encoder=encoder,
            network=EncoderNetwork(config),
            quantizer=make_quantizer(sizes, widths[-1]),
            decoder=DecoderNetwork(config),
        )

    return make


@pytest.fixture(scope="session")
def clustered() -> Tensor:
    """600 embeddings (600, 12) in 20 clusters, as catalogues are."""
    source = torch.Generator().manual_seed(11)
    centres = torch.randn(20, 12, generator=source)
    rows = torch.randint(20, (600,), generator=source)
    return centres[rows] + 0.2 * torch.randn(600, 12, generator=source)


TEXTS = [
    "Argan Oil Shampoo. Moroccan Sun. Beauty > Hair Care > Shampoos",
    "M6 x 20 mm hex bolt, zinc plated",
    "x",
    "Crème brûlée torch. Küchenprofi. Kitchen > Tools > Torches. Refillable, with a safety lock",
    "The Left Hand of Darkness. Ursula K. Le Guin. Books > Science Fiction",
    "無線マウス 2.4GHz. Logi. Electronics > Mice",
    "Men's running shoes, size 10, blue and white. Strider. Shoes > Running. "
    + "Breathable mesh with cushioned sole. " * 9,
    "A4 copy paper 80 g, 500 sheets",
    "Catan. Kosmos. Board Games > Strategy",
    "Red lipstick",
    "Red lipstick, matte",
    "Wireless charger " * 60,
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Texts of many lengths: one piece, one that is cut, several scripts."""
    return TEXTS
