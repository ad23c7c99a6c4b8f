"""The tree: uneven nodes, rows measured together, leaves in order, and what is no tree."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans

from models.training.cluster import ClusterConfig, fit_clusters
from models.tree import TreeQuantizer


@pytest.fixture(scope="module")
def rows():
    """2,000 latents (2000, 10) around 40 centres of very different sizes."""
    source = torch.Generator().manual_seed(9)
    chances = torch.linspace(1, 0.01, 40) ** 3
    places = torch.multinomial(chances, 2_000, replacement=True, generator=source)
    return 3 * torch.randn(40, 10, generator=source)[places] + torch.randn(2_000, 10, generator=source)


def fitted(rows, sizes=(6, 6, 6), **options):
    return fit_clusters("hierarchical", rows, ClusterConfig(codebook_sizes=sizes, held_out=0.0, **options)).model


@pytest.fixture
def uneven():
    """A root of 2 children, of which the first has 3 and the second 1."""
    tree = TreeQuantizer((2, 4), 2)
    tree.grow(0, torch.tensor([[-10.0, 0.0], [10.0, 0.0]]), torch.tensor([2]))
    tree.grow(1, torch.tensor([[-12.0, 0.0], [-10.0, 0.0], [-8.0, 0.0], [10.0, 0.0]]), torch.tensor([3, 1]))
    return tree.double()


def test_the_tree_errs_as_little_as_one_of_scikit_learn_s_k_means():
    # given rows without lumps, of which one random start would find more than another
    rows = torch.randn(3_000, 10, generator=torch.Generator().manual_seed(1)) * torch.linspace(2, 0.5, 10)
    model = fitted(rows, (5, 5))
    ours = model.quantizer.quantize(model.network(rows).detach()).residuals[:, -1].square().sum(dim=1).mean()
    # when
    total = 0.0
    points = rows.numpy()
    root = KMeans(5, n_init=1, random_state=0).fit(points)
    for code in range(5):
        inside = points[root.labels_ == code]
        total += KMeans(min(5, len(inside)), n_init=1, random_state=0).fit(inside).inertia_
    # then
    assert float(ours) == pytest.approx(total / len(rows), rel=0.04)


def test_a_path_leads_to_its_own_node_and_decodes_to_its_centre(uneven):
    quantization = uneven.quantize(torch.tensor([[-8.4, 1.0], [-13.0, 0.0], [9.0, 0.0]]).double())
    assert quantization.codes.tolist() == [[0, 2], [0, 0], [1, 0]]
    assert uneven.decode(quantization.codes).tolist() == [[-8.0, 0.0], [-12.0, 0.0], [10.0, 0.0]]
    received = torch.tensor([[-8.4, 1], [1.6, 1], [-0.4, 1]]).double()
    assert torch.allclose(quantization.residuals[0], received)


def test_the_margin_counts_planes_on_the_path_only(uneven):
    # of the second, the only child of its node, the plane in front of the root alone
    margins = uneven.quantize(torch.tensor([[-8.4, 0.0], [0.5, 0.0]]).double()).margins
    assert margins.tolist() == [[pytest.approx(8.4), pytest.approx(0.6)], [pytest.approx(0.5), float("inf")]]


@pytest.mark.parametrize("exact", [True, False])
def test_ties_of_siblings_go_to_the_lowest_code(uneven, exact):
    quantization = uneven.quantize(torch.tensor([[-9.0, 3.0], [0.0, 1.0]]).double(), exact=exact)
    assert quantization.codes.tolist() == [[0, 1], [0, 2]]
    assert quantization.margins[0, 1] == quantization.margins[1, 0] == 0


def test_a_child_that_does_not_exist_is_never_chosen_nor_decoded(uneven):
    far = uneven.quantize(torch.tensor([[1e6, 0.0], [10.0, 1e6], [0.1, 0.0]]).double())
    assert far.codes[:, 1].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"\[1, 2\] lead nowhere: there is no child 2 at level 2"):
        uneven.decode(torch.tensor([[0, 2], [1, 2]]))


def test_every_node_that_training_made_is_reached_by_a_training_row(rows):
    model = fitted(rows, (8, 8, 8))
    codes = model.quantizer.quantize(model.network(rows)).codes
    assert len(codes.unique(dim=0)) == len(model.quantizer.centres(2))
    assert int(model.quantizer.offsets(2).diff().min()) == 1  # some are small
    assert int(model.quantizer.offsets(2).diff().max()) == 8


def test_a_node_of_few_rows_has_each_of_them_as_a_child_and_fewer_children_if_wished():
    rows = torch.tensor([[0.0, 0], [0, 1], [0, 1], [50, 0], [50, 2], [51, 1]])
    model = fitted(rows, (2, 4))
    assert model.quantizer.offsets(1).diff().sort().values.tolist() == [2, 3]
    assert torch.allclose(
        model.decoder(model.quantizer.decode(model.quantizer.quantize(model.network(rows)).codes)), rows
    )
    assert fitted(rows, (2, 4), rows_per_child=3).quantizer.offsets(1).diff().tolist() == [1, 1]


@pytest.mark.parametrize("limit", ["DIFFERENCES", "TILE_NUMBERS", "TILE_ROWS"])
def test_codes_do_not_depend_on_how_many_rows_are_measured_at_once(limit, rows, monkeypatch):
    model = fitted(rows)
    tree, latents = model.quantizer.double(), model.network(rows).double()
    whole = tree.quantize(latents)
    monkeypatch.setattr(f"models.tree.{limit}", 7 if limit == "TILE_ROWS" else 700)
    pieces = tree.quantize(latents, exact=limit == "DIFFERENCES")
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.allclose(whole.margins, pieces.margins)


@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("sizes", [(6, 6, 6), (40, 40), (3,) * 6])
def test_the_fast_form_measures_as_the_exact_one_at_every_node(sizes, offset, rows):
    # given rows of every node and, far from all of them, rows of none
    model = fitted(rows[:1_500] + offset, sizes)
    tree, latents = model.quantizer.double(), model.network(torch.cat([rows, 50 * rows[:100]]) + offset).double()
    # when
    fast, exact = tree.quantize(latents), tree.quantize(latents, exact=True)
    # then
    assert torch.equal(fast.codes, exact.codes)
    assert torch.allclose(fast.margins, exact.margins, rtol=1e-6, atol=1e-9)
    assert (fast.margins <= exact.margins * (1 + 1e-9)).all()


def test_the_fast_form_leaves_siblings_that_rounding_cannot_part_to_the_exact_one(generator):
    # given siblings a rounding step from each other, two of them equal, far from the centre of their node
    crowd = 1 + 1e-15 * torch.arange(40, dtype=torch.float64).flip(0)
    crowd[7] = crowd[8]
    tree = TreeQuantizer((2, 41), 1)
    tree.grow(0, torch.tensor([[0.0], [9e9]], dtype=torch.float64), torch.tensor([2]))
    leaves = torch.cat([torch.tensor([-3000.0], dtype=torch.float64), crowd, torch.tensor([9e9]).double()])[:, None]
    tree.grow(1, leaves, torch.tensor([41, 1]))
    # when
    fast, exact = (tree.quantize(leaves[:-1], exact=exact) for exact in (False, True))
    # then
    assert torch.equal(fast.codes, exact.codes)
    assert (fast.margins <= exact.margins).all()
    assert 8 in exact.codes[:, 1].tolist()
    assert 9 not in exact.codes[:, 1].tolist()


@pytest.mark.parametrize("exact", [False, True])
def test_leaves_of_a_node_are_ranked_by_their_distance(exact, rows):
    model = fitted(rows)
    tree, latents = model.quantizer.double(), model.network(rows[:200]).detach().double()
    quantization = tree.quantize(latents)

    ranking = tree.rank(quantization, 4, exact=exact)

    assert ranking.codes.shape == (200, 4)
    for latent, path, ranked in zip(latents, quantization.codes, ranking.codes.tolist(), strict=True):
        node = tree._node(path[None, :2])
        start, end = tree.offsets(2)[node], tree.offsets(2)[node + 1]
        distances = (tree.centres(2)[start:end] - latent).norm(dim=1)
        nearest = distances.argsort(stable=True)[:4].tolist()
        assert ranked == nearest + [nearest[-1]] * (4 - len(nearest))
    assert torch.equal(ranking.codes[:, 0], quantization.codes[:, -1])


@pytest.mark.parametrize("exact", [False, True])
def test_a_row_with_fewer_leaves_to_rank_repeats_its_last_and_an_only_leaf_is_certain(exact, uneven):
    quantization = uneven.quantize(torch.tensor([[-9.25, 3.0], [9.0, 1.0]]).double())
    ranking = uneven.rank(quantization, 16, exact=exact)
    assert ranking.codes.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0]]
    assert ranking.margin.tolist() == [0.25, float("inf")]
    assert uneven.rank(quantization, 2, exact=exact).codes.tolist() == [[1, 2], [0, 0]]


def test_a_push_below_its_margin_changes_no_ranking_of_leaves(rows, generator):
    model = fitted(rows)
    tree, latents = model.quantizer.double(), model.network(rows[:300]).detach().double()
    quantization = tree.quantize(latents)
    ranking = tree.rank(quantization, 3)
    margin = ranking.margin.minimum(quantization.margins.amin(dim=1))
    changed = 0
    for _ in range(10):
        push = torch.nn.functional.normalize(torch.randn(300, 10, generator=generator, dtype=torch.float64), dim=1)
        within = tree.rank(tree.quantize(latents + 0.999 * margin[:, None] * push), 3)
        assert torch.equal(within.codes, ranking.codes)
        beyond = tree.rank(tree.quantize(latents + 30 * margin[:, None] * push), 3)
        changed += int((beyond.codes != ranking.codes).any(dim=1).sum())
    assert changed > 100


def test_a_batch_without_rows_has_no_codes(uneven):
    assert uneven.quantize(torch.zeros(0, 2).double()).codes.shape == (0, 2)


@pytest.mark.parametrize(
    ("centres", "children"), [((3, 2), [1, 1]), ((2, 2), [2, 0]), ((6, 2), [5, 1]), ((2, 3), [1, 1]), ((2, 2), [2])]
)
def test_what_is_no_tree_is_refused_when_grown_and_when_loaded(centres, children, uneven):
    with pytest.raises(ValueError, match="level 2 of the tree does not fit"):
        uneven.grow(1, torch.zeros(centres), torch.tensor(children))
    state = uneven.state_dict()
    state["centres_1"], state["offsets_1"] = torch.zeros(centres), torch.tensor([0, *children]).cumsum(0)
    with pytest.raises(ValueError, match="level 2 of the tree does not fit"):
        TreeQuantizer((2, 4), 2).load_state_dict(state)


def test_a_loaded_tree_is_the_one_that_was_saved(uneven):
    other = TreeQuantizer((2, 4), 2).double()
    other.load_state_dict(uneven.state_dict())
    latents = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).double() * 10
    assert torch.equal(other.quantize(latents).codes, uneven.quantize(latents).codes)
    with pytest.raises(RuntimeError, match="centres_1"):
        other.load_state_dict({k: v for k, v in uneven.state_dict().items() if k != "centres_1"})


@pytest.mark.parametrize(("sizes", "dimension"), [((), 2), ((2, 0), 2), ((2,), 0)])
def test_a_tree_without_levels_codewords_or_width_is_refused(sizes, dimension):
    with pytest.raises(ValueError, match="needs levels"):
        TreeQuantizer(sizes, dimension)
