"""Contracts of fairbook.plots: contrast on two pages, colour-blind distances, a style that can be undone, animations that stand alone."""
import re
from base64 import b64decode
from io import BytesIO
from itertools import combinations

import matplotlib as mpl

mpl.use("agg")
import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.animation import FuncAnimation
from PIL import Image

from fairbook.plots import INKS, MARKERS, PALETTE, _png, figure, group_color, group_marker, live, show_animation, use_style

PAGES = ["#ffffff", "#222222", "#212529"]


def linear(h): return np.array([c / 12.92 if c <= .04045 else ((c + .055) / 1.055) ** 2.4 for c in (int(h[i:i + 2], 16) / 255 for i in (1, 3, 5))])


def contrast(a, b):
    a, b = (linear(h) @ [.2126, .7152, .0722] + .05 for h in (a, b))
    return max(a, b) / min(a, b)


def lab(rgb):
    """CIE L*a*b* of linear sRGB under D65: another space than the one in which the palette was chosen."""
    xyz = np.array([[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750], [.0193339, .1191920, .9503041]]) @ rgb / [.95047, 1, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.fixture(autouse=True)
def untouched():
    with mpl.rc_context(): yield
    plt.close("all")


@pytest.mark.parametrize("page", PAGES)
def test_one_ink_and_every_group_colour_show_on_white_and_dark_pages(page):
    assert min(contrast(c, page) for c in (INKS["auto"][1], *PALETTE)) >= 3


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_fixed_modes_have_text_contrast(mode): assert contrast(*reversed(INKS[mode])) >= 7


@pytest.mark.parametrize("name, matrix", [  # severity 1.0 of the physiological model of Machado, Oliveira and Fernandes (2009)
    ("full", np.eye(3)),
    ("protanopia", [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]]),
    ("deuteranopia", [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]]),
])
def test_colours_stay_apart_for_colour_blind_eyes(name, matrix):
    seen = [lab(np.clip(np.array(matrix) @ linear(c), 0, 1)) for c in PALETTE]
    distance = [np.linalg.norm(a - b) for a, b in combinations(seen, 2)]
    assert min(distance) >= 10 and distance[0] >= 40, (name, min(distance), distance[0])


def test_42_groups_have_42_looks():
    assert len({(group_color(g), group_marker(g)) for g in range(42)}) == 42
    assert len(set(PALETTE)) == 7 and len(set(MARKERS)) == 6


@pytest.mark.parametrize("g", [np.int64(3), np.uint8(3)])
def test_group_numbers_of_any_integer_type(g): assert group_color(g) == group_color(3) and group_marker(g) == group_marker(3)


def test_group_number_from_torch():
    torch = pytest.importorskip("torch")
    assert group_color(torch.tensor(3)) == group_color(3)


@pytest.mark.parametrize("call, word", [
    (lambda: use_style("sepia"), "mode.*'sepia'"), (lambda: group_color(-1), "-1"), (lambda: group_marker(-1), "-1"), (lambda: figure(width="huge"), "width.*'huge'"),
])
def test_bad_input(call, word):
    with pytest.raises(ValueError, match=word): call()


@pytest.mark.parametrize("mode", list(INKS))
def test_style_is_undone(mode):
    mpl.rcParams["lines.linewidth"] = 7.5
    before = dict(mpl.rcParams)
    with use_style(mode):
        assert dict(mpl.rcParams) != before
        with use_style("dark"): assert mpl.rcParams["text.color"] == INKS["dark"][1]
        assert mpl.rcParams["text.color"] == INKS[mode][1]
    assert dict(mpl.rcParams) == before
    with pytest.raises(ZeroDivisionError), use_style(mode): 1 / 0
    assert dict(mpl.rcParams) == before
    use_style(mode).restore()
    assert dict(mpl.rcParams) == before


def test_auto_figures_are_transparent_and_light_ones_are_not(tmp_path):
    for mode, alpha in (("auto", 0), ("light", 1), ("dark", 1)):
        with use_style(mode):
            fig, ax = figure()
            fig.savefig(tmp_path / "f.png")
        corner = plt.imread(tmp_path / "f.png")[0, 0]
        assert corner[3] == alpha, mode


def test_figure_sizes():
    fig, axes = figure(3, 2, width="wide")
    assert fig.get_figwidth() == 9 and axes.shape == (2, 3)
    assert figure()[0].get_figwidth() == 6.4 and figure(height=2)[0].get_figheight() == 2


def animation(frames=4, **kwargs):
    fig, ax = figure(height=2.)
    [line] = ax.plot([], [])
    ax.set(xlim=(0, 1), ylim=(0, 1))
    return FuncAnimation(fig, lambda k: line.set_data([0, 1], [0, k / frames]), frames=frames, **kwargs)


def test_animation_stands_alone_and_repeats_exactly():
    with use_style(): a, b = show_animation(animation()).data, show_animation(animation()).data
    assert a == b and not re.search("https?:|<link|fa-", a)
    assert a.count("data:image/png;base64") == 4 and "aria-label" in a and plt.get_fignums() == []


def test_two_animations_on_one_page_do_not_share_names():
    name = lambda html: re.search(r"_anim_img(\w+)", html.data)[1]
    assert name(show_animation(animation(3))) != name(show_animation(animation(5)))


def test_animation_plays_at_its_interval_and_repeats_if_asked():
    once, loop = show_animation(animation(interval=50, repeat=False)).data, show_animation(animation(interval=50)).data
    assert re.search(r"slider_id, 50(\.0)?,", once) and re.search(r'value="once"[^>]*checked', once) and re.search(r'value="loop"[^>]*checked', loop)


def test_heavy_animation_is_refused():
    with pytest.raises(ValueError, match="MB, more than 0.01: draw fewer frames"): show_animation(animation(), max_mb=.01)


def frames(html): return [Image.open(BytesIO(b64decode(f))) for f in re.findall(r';base64,([^"]+)', html.data)]


def test_frames_have_few_colours_and_the_film_fits_a_phone():
    film = show_animation(animation())
    assert [f.mode for f in frames(film)] == ["P"] * 4 and all(len(f.getcolors()) <= 256 for f in frames(film))
    assert re.search(r"<style>[^<]*anim-slider \{max-width: 100%", film.data)


def drawing(kind):
    fig, ax = figure()
    if kind == "lines": [ax.plot(np.sin(np.arange(60) / (g + 3)), color=group_color(g), alpha=.6, lw=3) for g in range(7)]
    if kind == "picture": ax.imshow(np.arange(600).reshape(20, 30))
    if kind == "scale": fig.colorbar(ax.scatter([0, 1], [0, 1], c=[0, 1]))
    if kind == "mesh": ax.pcolormesh(np.arange(600).reshape(20, 30))
    return fig


def full_png(fig):
    fig.savefig(file := BytesIO(), format="png", dpi=100, facecolor=fig.get_facecolor())
    return file.getvalue()


def on_page(png, page):
    image = Image.open(BytesIO(png)).convert("RGBA")
    return np.array(Image.alpha_composite(Image.new("RGBA", image.size, page), image), float)[..., :3]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("mode", list(INKS))
def test_few_colours_look_the_same_on_every_page_and_are_smaller(mode, page):
    with use_style(mode): fig = drawing("lines")
    full, small = full_png(fig), _png(fig)
    changed = abs(on_page(full, page) - on_page(small, page))
    assert len(small) < .5 * len(full) and changed.mean() < 1.5 and np.quantile(changed, .99) <= 16


@pytest.mark.parametrize("g", range(7))
def test_few_colours_keep_the_colour_of_a_group(g):
    with use_style(): fig, ax = figure()
    for k in range(7): ax.axhspan(k, k + 1, color=group_color(k))
    ax.plot(np.random.default_rng(0).random(50) * 7, alpha=.4)
    wanted = np.array([int(group_color(g)[i:i + 2], 16) for i in (1, 3, 5)])
    assert (abs(on_page(_png(fig), "white") - wanted).max(-1) <= 8).sum() > 1000


@pytest.mark.parametrize("kind", ["picture", "scale", "mesh"])
def test_pictures_and_colour_scales_keep_every_shade(kind):
    fig = drawing(kind)
    assert (on_page(_png(fig), "white") == on_page(full_png(fig), "white")).all()


def test_live_draws_anew_for_every_slider_and_closes_only_its_own_figures():
    mine, seen = plt.figure(), []
    def draw(a, b):
        seen.append((a, b))
        return drawing("lines" if a else "none")
    a, b = widgets.IntSlider(1), widgets.Dropdown(options=["x", "y"], description="letter")
    box = live(draw, a=a, b=b)
    first = box.children[-1].value
    assert box.children[:2] == (a, b) and (a.description, b.description) == ("a", "letter")
    assert Image.open(BytesIO(first)).size[0] == 640
    a.value, b.value = 0, "y"
    assert seen == [(1, "x"), (0, "x"), (0, "y")] and box.children[-1].value != first
    a.value = 1
    assert box.children[-1].value == first and plt.get_fignums() == [mine.number]


@pytest.mark.parametrize("call, word", [
    (lambda: live(lambda: figure()[0]), "at least one slider"),
    (lambda: live(lambda x: None, x=widgets.IntSlider()), "draw must return a matplotlib figure, got NoneType"),
    (lambda: live(lambda x: figure(), x=widgets.IntSlider()), "got tuple"),
])
def test_live_refuses(call, word):
    with pytest.raises(ValueError, match=word): call()
