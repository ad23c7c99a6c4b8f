from __future__ import annotations

import pytest
import torch

from models.training.kmeans import KMeansConfig, assign, kmeans


def test_separated_clusters_are_found_with_their_means(generator):
    # given three clusters far apart
    points = torch.cat([torch.randn(50, 2, generator=generator) * 0.1 + centre for centre in (0.0, 5.0, 10.0)])
    # when
    codebook, codes, inertia = kmeans(points, 3, generator)
    # then each codeword is the mean of a cluster
    means = torch.stack([points[start : start + 50].mean(dim=0) for start in (0, 50, 100)])
    assert torch.allclose(codebook[codebook[:, 0].argsort()], means, atol=1e-4)
    assert codes.view(3, 50).unique(dim=1).shape == (3, 1)
    assert inertia < 0.1


def test_more_codewords_than_distinct_points_gives_no_nan(generator):
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(5, 1)
    codebook, codes, inertia = kmeans(points, 8, generator)
    assert codebook.isfinite().all()
    assert len(codes.unique()) == 2
    assert inertia == pytest.approx(0, abs=1e-10)


def test_an_empty_cluster_restarts_where_points_are_served_badly(generator):
    # given a start that would leave codewords empty: nearly all points are equal, one outlier hides from the seeding
    points = torch.cat([torch.zeros(500, 2), torch.randn(40, 2, generator=generator) * 3])
    codebook, codes, _ = kmeans(points, 16, generator, config=KMeansConfig(iterations=50, tolerance=0))
    # then every codeword is in use
    assert len(codes.unique()) == 16
    assert codebook.isfinite().all()


def test_an_offset_of_100_changes_no_code(generator):
    # given
    points = torch.randn(20_000, 32, generator=generator)
    codebook = torch.randn(256, 32, generator=generator)
    exact = torch.cdist(points.double(), codebook.double()).argmin(dim=1)
    # when the same data lies far from the origin
    codes, _ = assign(points + 100, codebook + 100)
    # then at most float32's rounding of the data itself shows
    moved = torch.cdist((points + 100).double(), (codebook + 100).double()).argmin(dim=1)
    assert (codes != moved).float().mean() < 1e-4
    assert (codes != exact).float().mean() < 1e-3


def test_the_same_seed_gives_the_same_clustering():
    points = torch.randn(400, 5, generator=torch.Generator().manual_seed(1))
    first, second = (kmeans(points, 12, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first.codebook, second.codebook)
    assert torch.equal(first.codes, second.codes)


def test_a_row_of_weight_two_counts_as_two_rows(generator):
    points = torch.tensor([[0.0], [1.0], [10.0]])
    codebook, _, _ = kmeans(points, 2, generator, torch.tensor([2.0, 1.0, 1.0]))
    assert codebook.sort(dim=0).values.flatten().tolist() == pytest.approx([1 / 3, 10.0])


@pytest.mark.parametrize(
    ("points", "size", "weights"),
    [
        (torch.zeros(3), 2, None),
        (torch.zeros(0, 3), 2, None),
        (torch.zeros(3, 2), 0, None),
        (torch.full((3, 2), torch.nan), 2, None),
        (torch.zeros(3, 2), 2, torch.tensor([1.0, -1.0, 1.0])),
        (torch.zeros(3, 2), 2, torch.zeros(3)),
        (torch.zeros(3, 2), 2, torch.ones(2)),
    ],
)
def test_what_is_no_data_is_refused(points, size, weights, generator):
    with pytest.raises(ValueError, match="k-means needs"):
        kmeans(points, size, generator, weights)


def test_of_several_starts_the_best_is_kept():
    # given clusters so many that a single start hardly finds all of them
    random = torch.Generator().manual_seed(0)
    points = (torch.randn(30, 2, generator=random) * 20).repeat_interleave(40, 0)
    points = points + torch.randn(points.shape, generator=random)
    # when
    generator = torch.Generator().manual_seed(1)
    alone = [kmeans(points, 30, generator).inertia for _ in range(6)]
    best = kmeans(points, 30, torch.Generator().manual_seed(1), config=KMeansConfig(starts=6))
    # then the starts are drawn one after the other
    assert best.inertia == min(alone) < alone[0]
    again = kmeans(points, 30, torch.Generator().manual_seed(1), config=KMeansConfig(starts=6))
    assert torch.equal(best.codebook, again.codebook)
    assert best.inertia == pytest.approx(float(assign(points, best.codebook)[1].mean()), rel=1e-5)
