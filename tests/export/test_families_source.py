"""What an exporter takes from a model folder: prompts, images and positions as transformers' own processors make them."""

import numpy as np
import pytest
import torch
from PIL import Image

from comp_edge.checkpoint import save_pretrained
from comp_edge.errors import InputError
from comp_edge.surgery import apply_plan
from export.executorch.__main__ import main as export_executorch
from export.inputs import image_grid, image_inputs, request_inputs
from export.positions import ImageGrid, prompt_positions
from export.reference import image_spec, prompt_spec, synthetic_requests
from export.source import load_source
from tests.export.family_models import NAMES, make_sample

FAMILIES = pytest.mark.parametrize("name", NAMES)
AROUND = {
    "llava": "{}",
    "idefics3": "<fake_token_around_image><global-img>{}<fake_token_around_image>",
    "smolvlm": "<fake_token_around_image><global-img>{}<fake_token_around_image>",
    "internvl": "<img>{}</img>",
    "qwen2.5-vl": "<|vision_start|>{}<|vision_end|>",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(name)`: a pruned folder of the family."""
    made = {}

    def get(name):
        if name not in made:
            one = make_sample(name, "pruned", text_tokens=60)
            where = tmp_path_factory.mktemp("families") / name
            made[name] = save_pretrained(one.model, one.plan, where, processor=one.processor)
        return made[name]

    return get


@FAMILIES
def test_prompts_are_the_processors(folder, name):
    source = load_source(folder(name))
    token = source.processor.image_token
    assert AROUND[name].format(token) in source.template
    # The processor's own expansion of the same chat, its image tokens taken as one.
    picture = Image.fromarray(np.zeros((*source.image_size, 3), np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "red house north 3"}]
    chat = source.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    options = {"do_image_splitting": False} if name in ("idefics3", "smolvlm") else {}
    given = source.processor(text=chat, images=[picture], add_special_tokens=False, **options)["input_ids"][0]
    ids = [i for k, i in enumerate(given) if i != source.image_token_id or given[k - 1] != i]
    assert source.prompt_ids("red house north 3") == ids
    assert given.count(source.image_token_id) == source.dense_image_tokens
    assert prompt_spec(source).image_tokens == source.image_tokens < source.dense_image_tokens


@FAMILIES
def test_images_are_the_processors(folder, name):
    """A picture of the right size, rescaled and normalized as the manifest says, is what the processor gives the model."""
    source = load_source(folder(name))
    spec = image_spec(source)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (*source.image_size, 3), dtype=np.uint8)
    # A picture that has the right size already is not to be scaled up and down again.
    options = {"do_image_splitting": False, "do_resize": False} if name in ("idefics3", "smolvlm") else {}
    given = source.processor.image_processor(images=[Image.fromarray(pixels)], return_tensors="pt", **options)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    image = ((torch.from_numpy(pixels).permute(2, 0, 1) * spec.rescale - mean) / std)[None]
    mine = image_inputs(source.model, image)
    for key, value in mine.items():
        assert given[key].shape == value.shape
        assert torch.allclose(given[key].float(), value.float(), atol=1e-5)


@pytest.mark.parametrize(("height", "width", "delivered"), [(5, 5, 16), (3, 7, 4), (7, 2, 14)])
@torch.no_grad()
def test_positions_differ_as_transformers_positions_do(height, width, delivered):
    one = make_sample("qwen2.5-vl", "dense")
    step = 8
    image = torch.zeros(1, 3, height * step, width * step)
    ids = [20, 21, 22, one.model.config.image_token_id, 23, 24]
    inputs = request_inputs(one.model, image, ids, image_tokens=height * width)
    assert image_grid(one.model, image.shape[-2:]) == (height, width)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    theirs, delta = one.model.model.get_rope_index(**{key: inputs[key] for key in names})
    kept = torch.randperm(height * width)[:delivered].sort().values
    rows = torch.cat([torch.arange(3), 3 + kept, 3 + height * width + torch.arange(2)])
    theirs = theirs[:, 0, rows]
    pads, grid = 2, ImageGrid(height, width, delivered)
    slots = pads + len(rows)
    mine = prompt_positions(grid, slots=slots, first=pads + 3, kept=kept)
    shift = mine[:, pads:] - theirs
    assert shift.unique().numel() == 1 and mine.min() >= 0
    # A generated token follows the last slot at the same distance, whatever the prompt.
    first_generated = 5 + height * width + int(delta)
    assert slots + grid.after == first_generated + int(shift[0, 0])


def test_one_image_of_one_size(folder, tmp_path):
    with pytest.raises(InputError, match="image size 40x48 was given; the model takes 64x64"):
        load_source(folder("smolvlm"), size=(40, 48))
    qwen = folder("qwen2.5-vl")
    assert load_source(qwen).image_size == (40, 40)
    # The same number of patches in another form is what the plan is for, too.
    assert load_source(qwen, size=(8, 200)).grid == ImageGrid(1, 25, 16)
    with pytest.raises(InputError, match="multiples of 8"):
        load_source(qwen, size=(44, 40))
    with pytest.raises(InputError, match="makes 144 patches of 4 pixels; the plan is for images of 100"):
        load_source(qwen, size=(48, 48))

    one = make_sample("internvl", "dense")
    plan = one.plan.model_copy(update={"images": 2})
    apply_plan(one.model, plan)
    two = save_pretrained(one.model, plan, tmp_path / "two", processor=one.processor)
    with pytest.raises(InputError, match="2 images or tiles"):
        load_source(two)


def test_a_profile_that_cannot_be_is_refused_in_a_sentence(folder, tmp_path, capsys):
    out = tmp_path / "bundle"
    assert export_executorch([str(folder("qwen2.5-vl")), "-o", str(out), "--profile", "stock"]) == 2
    assert "no profile 'stock'" in capsys.readouterr().err and not out.exists()
    with pytest.raises(SystemExit):
        export_executorch([str(folder("smolvlm")), "-o", str(out), "--image-size", "64"])
    assert "HxW" in capsys.readouterr().err


def test_weights_in_bf16_are_noted(tmp_path):
    one = make_sample("smolvlm", "pruned")
    one.model.to(torch.bfloat16)
    where = save_pretrained(one.model, one.plan, tmp_path / "bf16", processor=one.processor)
    source = load_source(where)
    assert source.model.dtype == torch.float32 and any("bfloat16" in note for note in source.notes)
    assert any("one image of 64x64" in note for note in source.notes)


@FAMILIES
def test_made_up_requests_fit(folder, name):
    source = load_source(folder(name))
    requests = synthetic_requests(source, count=12)
    assert tuple(requests.pixel_values.shape) == (12, 3, *source.image_size)
    lengths = {len(source.prompt_ids(question)) for question in requests.questions}
    assert len(lengths) > 1 and max(lengths) <= source.text_tokens + 1
