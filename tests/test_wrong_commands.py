"""Wrong command lines: each ends in one line that names the flag, file or folder, with exit code 2."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import tiny_tbcm_pipeline, write_tiny_pipeline

from diffusers_tbcm import __main__ as command_line
from examples.tbcm import app, evaluate_student


WEIGHTS = "diffusion_pytorch_model.safetensors"


def damaged(folder: Path, name: str, component: str | None = None, **files: bytes | None) -> Path:
    """A copy of a pipeline without a component, or with other files; None cuts one in two."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    if component is not None:
        shutil.rmtree(copy / component)
    for path, content in files.items():
        file = copy / path
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    return copy


def other_config(folder: Path, **changes: object) -> bytes:
    return json.dumps(json.loads((folder / "transformer" / "config.json").read_bytes()) | changes).encode()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the command lines below name, by what is wrong with it."""
    root = tmp_path_factory.mktemp("places")
    student, teacher = root / "student", write_tiny_pipeline(root / "teacher")
    tiny_tbcm_pipeline().save_pretrained(student)
    config, weights = "transformer/config.json", f"transformer/{WEIGHTS}"
    for whole, name in ((student, "student"), (teacher, "teacher")):
        damaged(whole, f"{name}_torn", **{weights: None})
        damaged(whole, f"{name}_zero", **{weights: b""})
        damaged(whole, f"{name}_misfit", **{config: other_config(whole, num_layers=3, attention_head_dim=16)})
        damaged(whole, f"{name}_unconfigured", **{config: b"{"})
        damaged(whole, f"{name}_unindexed", **{"model_index.json": b"no json"})
        damaged(whole, f"{name}_listed", **{"model_index.json": b"[]"})
        damaged(whole, f"{name}_strange", **{"model_index.json": b'{"_class_name": "Nothing"}'})
        damaged(whole, f"{name}_without_vae", "vae")
        damaged(whole, f"{name}_without_transformer", "transformer")
        damaged(whole, f"{name}_torn_vae", **{f"vae/{WEIGHTS}": None})
        damaged(whole, f"{name}_torn_text", **{"text_encoder/model.safetensors": None})
        damaged(whole, f"{name}_torn_tokenizer", **{"tokenizer/tokenizer.json": None})
    (root / "empty").mkdir()
    (root / "file").write_text("no folder")
    (root / "prompts.txt").write_text("a dog\na bird\n")
    (root / "blank.txt").write_text("\n \n")
    (root / "latin.txt").write_bytes("une fenêtre\n".encode("latin-1"))
    (root / "other.csv").write_text("caption\na dog\n")
    (root / "torn.jsonl").write_text('{"text": "a dog"}\n{"text": \n')
    (root / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    (root / "torn.safetensors").write_bytes(b"\x00" * 5)
    (root / "lora").mkdir()
    (root / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"\x00" * 5)
    for name, metadata in (("pictures", '{"file_name": "0.png", "text": "a dog"}\n'), ("unlabelled", "")):
        (root / name).mkdir()
        Image.new("RGB", (64, 64)).save(root / name / "0.png")
        (root / name / "metadata.jsonl").write_text(metadata)
    (root / "torn_pictures").mkdir()
    (root / "torn_pictures" / "0.png").write_bytes(b"no picture")
    (root / "torn_pictures" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a dog"}\n')
    (root / "recorded").mkdir()
    (root / "recorded" / "training.json").write_text("{")
    (root / "finished").mkdir()
    (root / "finished" / "model_index.json").write_text("{}")
    return root


TRAIN = "--pretrained_model_name_or_path {teacher} --output_dir {new} --max_train_steps 1 --report_to none"
TBCM = f"{TRAIN} --prompts_file {{prompts.txt}} --route_steps 2"
PICTURES = f"{TRAIN} --train_data_dir {{pictures}}"
TEACHER = "--output_dir {new} --prompts_file {prompts.txt} --report_to none --pretrained_model_name_or_path"
EVALUATE = "--model {student} --prompts_file {prompts.txt} --output_dir {new} --steps 1 --bootstrap_resamples 20"
GENERATE = "generate --model {student} --prompt dog --steps 1 --out {new.png}"
DRAW = "generate --prompt dog --steps 1 --out {new.png}"

CASES = {
    "tbcm_distill": [
        # flags
        ("", "--output_dir"),
        ("--output_dir {new}", "--pretrained_model_name_or_path"),
        (TRAIN, "--prompts_file"),
        (f"{TBCM} --dataset_name x", "--dataset_name"),
        (f"{TBCM} --no_such_flag 1", "--no_such_flag"),
        (f"{TBCM} stray", "stray"),
        (f"{TBCM} --max_train_steps ten", "--max_train_steps"),
        (f"{TBCM} --max_train_steps 1.5", "--max_train_steps"),
        (f"{TBCM} --max_train_steps 0", "--max_train_steps"),
        (f"{TBCM} --max_train_steps", "--max_train_steps"),
        (f"{TBCM} --train_batch_size -1", "--train_batch_size"),
        (f"{TBCM} --gradient_accumulation_steps 0", "--gradient_accumulation_steps"),
        (f"{TBCM} --learning_rate nan", "--learning_rate"),
        (f"{TBCM} --learning_rate inf", "--learning_rate"),
        (f"{TBCM} --learning_rate=-1e-5", "--learning_rate"),
        (f"{TBCM} --max_grad_norm nan", "--max_grad_norm"),
        (f"{TBCM} --weight_decay nan", "--weight_decay"),
        (f"{TBCM} --weight_decay=-1", "--weight_decay"),
        (f"{TBCM} --lr_warmup_steps=-1", "--lr_warmup_steps"),
        (f"{TBCM} --lr_scheduler none", "--lr_scheduler"),
        (f"{TBCM} --lr_scheduler piecewise_constant", "--lr_scheduler"),
        (f"{TBCM} --optimizer sgd", "--optimizer"),
        (f"{TBCM} --use_8bit_adam --optimizer came", "--use_8bit_adam"),
        (f"{TBCM} --use_8bit_adam", "--use_8bit_adam"),
        (f"{TBCM} --ema_decay 1", "--ema_decay"),
        (f"{TBCM} --ema_decay nan", "--ema_decay"),
        (f"{TBCM} --use_ema perhaps", "--use_ema"),
        (f"{TBCM} --mixed_precision fp8", "--mixed_precision"),
        (f"{TBCM} --seed=-1", "--seed"),
        (f"{TBCM} --seed 99999999999999999999", "--seed"),
        (f"{TBCM} --checkpoints_total_limit 0", "--checkpoints_total_limit"),
        (f"{TBCM} --report_to no_tracker", "--report_to"),
        (f"{TBCM} --report_to wandb", "--report_to"),
        (f"{TBCM} --hub_license mit", "--hub_license"),
        (f"{TBCM} --hub_strategy often", "--hub_strategy"),
        (f"{TBCM} --push_to_hub --hub_model_id a/b/c --hub_license mit", "a/b/c"),
        (f"{TBCM} --push_to_hub", "--hub_license"),
        (f"{TBCM} --guidance_scales 0", "--guidance_scales"),
        (f"{TBCM} --guidance_scales nan", "--guidance_scales"),
        (f"{TBCM} --guidance_scales inf", "--guidance_scales"),
        (f"{TBCM} --guidance_scales", "--guidance_scales"),
        (f"{TBCM} --replay_steps 2", "--replay_steps"),
        (f"{TBCM} --replay_buffer_size=-4", "--replay_buffer_size"),
        (f"{TBCM} --train_batch_size 2 --teacher_batch_size 3", "--teacher_batch_size"),
        (f"{TBCM} --max_sequence_length 0", "--max_sequence_length"),
        (f"{TBCM} --resolution 0", "--resolution"),
        (f"{TBCM} --resolution 30", "--resolution"),
        (f"{TBCM} --rank 0", "--rank"),
        (f"{TBCM} --lora_alpha 4", "--lora_alpha"),
        (f"{TBCM} --rank 2 --lora_target_modules nothing_like_it", "--lora_target_modules"),
        (f"{TBCM} --rank 2 --export_variants bf16", "--export_variants"),
        (f"{TBCM} --export_variants int8", "--export_variants"),
        (f"{TBCM} --route_steps 1", "--route_steps"),
        (f"{TBCM} --flow_shift 0", "--flow_shift"),
        (f"{TBCM} --flow_shift inf", "--flow_shift"),
        (f"{TBCM} --logit_std nan", "--logit_std"),
        (f"{TBCM} --logit_mean nan", "--logit_mean"),
        (f"{TBCM} --brightness_threshold nan", "--brightness_threshold"),
        (f"{TBCM} --tangent_warmup_steps=-1", "--tangent_warmup_steps"),
        (f"{TBCM} --tangent_final_ratio nan", "tangent"),
        (f"{TBCM} --sampling_scheme none", "--sampling_scheme"),
        (f"{TBCM} --streaming", "--streaming"),
        (f"{TBCM} --max_prompts 0", "--max_prompts"),
        (f"{TBCM} --validation_prompts", "--validation_prompts"),
        # files
        (f"{TRAIN} --prompts_file {{none.txt}}", "none.txt"),
        (f"{TRAIN} --prompts_file {{none}}", "none"),
        (f"{TRAIN} --prompts_file {{blank.txt}}", "blank.txt"),
        (f"{TRAIN} --prompts_file {{latin.txt}}", "latin.txt"),
        (f"{TRAIN} --prompts_file {{other.csv}}", "other.csv"),
        (f"{TRAIN} --prompts_file {{torn.jsonl}}", "torn.jsonl"),
        (f"{TRAIN} --prompts_file {{torn.parquet}}", "torn.parquet"),
        (f"{TRAIN} --prompts_file {{empty}}", "empty"),
        (f"{TRAIN} --dataset_name owner/none", "owner/none"),
        (f"{TBCM} --output_dir {{file}}", "--output_dir"),
        (f"{TBCM} --output_dir {{file}}/run", "file"),
        (f"{TBCM} --output_dir /proc/none/run", "/proc/none"),
        (f"{TBCM} --output_dir {{finished}}", "--output_dir"),
        (f"{TBCM} --resume_from_checkpoint {{none}}", "none"),
        (f"{TBCM} --precompute_embeddings {{file}}", "file"),
        (f"{TEACHER} {{none}}", "none"),
        (f"{TEACHER} owner/none", "owner/none"),
        (f"{TEACHER} {{empty}}", "empty"),
        (f"{TEACHER} {{file}}", "file"),
        (f"{TEACHER} {{teacher_torn}}", "teacher_torn"),
        (f"{TEACHER} {{teacher_zero}}", "teacher_zero"),
        (f"{TEACHER} {{teacher_misfit}}", "teacher_misfit"),
        (f"{TEACHER} {{teacher_unconfigured}}", "teacher_unconfigured"),
        (f"{TEACHER} {{teacher_unindexed}}", "teacher_unindexed"),
        (f"{TEACHER} {{teacher_listed}}", "teacher_listed"),
        (f"{TEACHER} {{teacher_strange}}", "teacher_strange"),
        (f"{TEACHER} {{teacher_without_vae}}", "teacher_without_vae"),
        (f"{TEACHER} {{teacher_without_transformer}}", "teacher_without_transformer"),
        (f"{TEACHER} {{teacher_torn_vae}}", "teacher_torn_vae"),
        (f"{TEACHER} {{teacher_torn_text}}", "teacher_torn_text"),
        (f"{TEACHER} {{teacher_torn_tokenizer}}", "teacher_torn_tokenizer"),
    ],
    "scm": [
        (TRAIN, "--train_data_dir"),
        (f"{TRAIN} --train_data_dir {{none}}", "--train_data_dir"),
        (f"{TRAIN} --train_data_dir {{file}}", "--train_data_dir"),
        (f"{TRAIN} --train_data_dir {{empty}}", "empty"),
        (f"{TRAIN} --train_data_dir {{unlabelled}}", "unlabelled"),
        (f"{TRAIN} --train_data_dir {{torn_pictures}}", "torn_pictures"),
        (f"{PICTURES} --caption_column none", "none"),
        (f"{PICTURES} --image_column none", "none"),
        (f"{PICTURES} --max_train_samples 0", "--max_train_samples"),
        (f"{PICTURES} --logit_std 0", "--logit_std"),
        (f"{PICTURES} --logit_mean inf", "--logit_mean"),
        (f"{PICTURES} --latents_cache {{file}}", "file"),
    ],
    "sana_sprint": [
        (f"{PICTURES} --head_block_ids 7", "--head_block_ids"),
        (f"{PICTURES} --head_block_ids", "--head_block_ids"),
        (f"{PICTURES} --adv_lambda nan", "--adv_lambda"),
        (f"{PICTURES} --scm_lambda=-1", "--scm_lambda"),
        (f"{PICTURES} --largest_timestep_prob 2", "--largest_timestep_prob"),
        (f"{PICTURES} --discriminator_learning_rate inf", "--discriminator_learning_rate"),
        (f"{PICTURES} --misaligned_pairs_D", "--misaligned_pairs_D"),
    ],
    "lcm": [
        (f"{PICTURES} --num_ddim_timesteps 0", "--num_ddim_timesteps"),
        (f"{PICTURES} --loss_type l3", "--loss_type"),
        (f"{PICTURES} --huber_c nan", "--huber_c"),
        (f"{PICTURES} --flow_shift nan", "--flow_shift"),
    ],
    "evaluate": [
        ("", "--model"),
        ("--model {student} --output_dir {new}", "--prompts_file"),
        (f"{EVALUATE} --steps 0", "--steps"),
        (f"{EVALUATE} --steps two", "--steps"),
        (f"{EVALUATE} --no_such_flag", "--no_such_flag"),
        (f"{EVALUATE} --num_images_per_prompt 0", "--num_images_per_prompt"),
        (f"{EVALUATE} --bootstrap_resamples 1", "--bootstrap_resamples"),
        (f"{EVALUATE} --guidance_scale nan", "--guidance_scale"),
        (f"{EVALUATE} --guidance_scale inf", "--guidance_scale"),
        (f"{EVALUATE} --resolution 30", "--resolution"),
        (f"{EVALUATE} --seed=-1", "--seed"),
        (f"{EVALUATE} --dtype int8", "--dtype"),
        (f"{EVALUATE} --max_prompts 1", "prompt"),
        (f"{EVALUATE} --features vgg", "--features"),
        (f"{EVALUATE} --update_card", "--update_card"),
        (f"{EVALUATE} --clip_model {{none}}", "none"),
        (f"{EVALUATE} --clip_model {{empty}}", "empty"),
        (f"{EVALUATE} --text_image_head {{empty}}", "empty"),
        (f"{EVALUATE} --reference_dir {{empty}}", "empty"),
        (f"{EVALUATE} --reference_dir {{none}}", "none"),
        (f"{EVALUATE} --reference_file {{none}}", "--reference_file"),
        (f"{EVALUATE} --reference_file {{file}}", "file"),
        (f"{EVALUATE} --reference_file {{torn.safetensors}}", "torn.safetensors"),
        (f"{EVALUATE} --label_column none", "none"),
        (f"{EVALUATE} --output_dir {{file}}", "file"),
        (f"{EVALUATE} --output_dir /proc/none/run", "/proc/none"),
        (f"{EVALUATE} --prompts_file {{none.txt}}", "none.txt"),
        (f"{EVALUATE} --prompts_file {{latin.txt}}", "latin.txt"),
        (f"{EVALUATE} --prompts_file {{blank.txt}}", "blank.txt"),
        (f"{EVALUATE} --prompts_file {{torn.jsonl}}", "torn.jsonl"),
        (f"{EVALUATE} --prompts_file {{torn.parquet}}", "torn.parquet"),
        (f"{EVALUATE} --prompts_file {{other.csv}}", "other.csv"),
        (f"{EVALUATE} --prompts_file {{empty}}", "empty"),
        (f"{EVALUATE} --model {{none}}", "none"),
        (f"{EVALUATE} --model {{teacher}}", "teacher"),
        (f"{EVALUATE} --model {{student_torn}}", "student_torn"),
        (f"{EVALUATE} --model {{student_misfit}}", "student_misfit"),
        (f"{EVALUATE} --model {{student_unindexed}}", "student_unindexed"),
        (f"{EVALUATE} --lora {{none}}", "none"),
        (f"{EVALUATE} --lora {{lora}}", "lora"),
        (f"{EVALUATE} --teacher {{teacher_torn}}", "teacher_torn"),
        (f"{EVALUATE} --teacher {{empty}}", "empty"),
    ],
    "cli": [
        ("", "command"),
        ("paint", "paint"),
        ("train", "script"),
        ("train other", "other"),
        ("generate", "--model"),
        (f"{DRAW}", "--model"),
        (f"{GENERATE} --steps 0", "--steps"),
        (f"{GENERATE} --steps many", "--steps"),
        (f"{GENERATE} --seed=-1", "--seed"),
        (f"{GENERATE} --seed 99999999999999999999", "--seed"),
        (f"{GENERATE} --width 0", "--width"),
        (f"{GENERATE} --height 30", "--height"),
        (f"{GENERATE} --height 99999999", "--height"),
        (f"{GENERATE} --guidance_scale nan", "--guidance_scale"),
        (f"{GENERATE} --guidance_scale inf", "--guidance_scale"),
        (f"{GENERATE} --guidance_scale strong", "--guidance_scale"),
        (f"{GENERATE} --dtype int8", "--dtype"),
        (f"{GENERATE} --device none", "--device"),
        (f"{GENERATE} --device cuda:99", "--device"),
        (f"{GENERATE} --device meta", "--device"),
        (f"{GENERATE} --no_such_flag", "--no_such_flag"),
        (f"{GENERATE} --prompts_file {{prompts.txt}}", "--prompts_file"),
        (f"{GENERATE} --out {{file}}/x.png", "file"),
        (f"{GENERATE} --out {{file}}", "--out"),
        (f"{GENERATE} --out /proc/none/x.png", "/proc/none"),
        (f"{GENERATE} --grid --out {{empty}}", "--grid"),
        (f"{GENERATE} --lora {{none}}", "none"),
        (f"{GENERATE} --lora {{lora}}", "lora"),
        (f"{GENERATE} --lora {{file}}", "file"),
        (f"{DRAW} --model {{none}}", "none"),
        (f"{DRAW} --model owner/none", "owner/none"),
        (f"{DRAW} --model {{empty}}", "empty"),
        (f"{DRAW} --model {{file}}", "file"),
        (f"{DRAW} --model {{teacher}}", "teacher"),
        (f"{DRAW} --model {{student_torn}}", "student_torn"),
        (f"{DRAW} --model {{student_zero}}", "student_zero"),
        (f"{DRAW} --model {{student_misfit}}", "student_misfit"),
        (f"{DRAW} --model {{student_unconfigured}}", "student_unconfigured"),
        (f"{DRAW} --model {{student_unindexed}}", "student_unindexed"),
        (f"{DRAW} --model {{student_listed}}", "student_listed"),
        (f"{DRAW} --model {{student_strange}}", "student_strange"),
        (f"{DRAW} --model {{student_without_vae}}", "student_without_vae"),
        (f"{DRAW} --model {{student_torn_vae}}", "student_torn_vae"),
        (f"{DRAW} --model {{student_torn_text}}", "student_torn_text"),
        (f"{DRAW} --model {{student_torn_tokenizer}}", "student_torn_tokenizer"),
        ("generate --model {student} --out {new} --prompts_file {none}", "--prompts_file"),
        ("generate --model {student} --out {new} --prompts_file {latin.txt}", "latin.txt"),
        ("generate --model {student} --out {new} --prompts_file {torn.jsonl}", "torn.jsonl"),
        ("generate --model {student} --out {new} --prompts_file {torn.parquet}", "torn.parquet"),
        ("generate --model {student} --out {new} --prompts_file {other.csv}", "other.csv"),
        ("push", "folder"),
        ("push {student}", "repo_id"),
        ("push {none} me/x", "none"),
        ("push {file} me/x", "file"),
        ("push {empty} me/x", "empty"),
        ("push {student} me/x --license mit", "student"),
        ("push {student_unindexed} me/x", "student_unindexed"),
        ("push {student_listed} me/x", "student_listed"),
        ("push {student} me/x --visible", "--visible"),
        ("card", "folder"),
        ("card {none}", "none"),
        ("card {file}", "file"),
        ("card {student}", "student"),
        ("card {recorded}", "recorded"),
        ("card {recorded} --licence mit", "--licence"),
    ],
    "app": [
        ("--model {none}", "none"),
        ("--model {empty}", "empty"),
        ("--model {file}", "file"),
        ("--model {teacher}", "teacher"),
        ("--model {student_torn}", "student_torn"),
        ("--model {student_misfit}", "student_misfit"),
        ("--model {student_unindexed}", "student_unindexed"),
        ("--model {student_without_vae}", "student_without_vae"),
        ("--model {student} --lora {none}", "none"),
        ("--model {student} --lora {lora}", "lora"),
        ("--model", "--model"),
        ("--port 1", "--port"),
    ],
}
MAINS = {"evaluate": evaluate_student.main, "cli": command_line.main, "app": app.main}
MAINS |= {
    name: import_module(f"diffusers_tbcm.scripts.{script}").main
    for name, script in command_line.TRAINING_SCRIPTS.items()
}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path_factory):
    """No Hub, no token, no accelerator of the test before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def filled(words: str, places: Path, new: Path) -> list[str]:
    """The words of a command line, `{name}` put in its place."""
    line = []
    for word in words.split():
        before, brace, rest = word.partition("{")
        name, _, after = rest.partition("}")
        place = new / name if name.startswith("new") else places / name
        line.append(f"{before}{place}{after}" if brace else word)
    return line


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        pytest.param(command, words, named, id=f"{command} {words.removeprefix(TBCM).removeprefix(PICTURES)}")
        for command, cases in CASES.items()
        for words, named in cases
    ],
)
def test_a_wrong_command_ends_in_one_line(command, words, named, places, tmp_path, capsys):
    before = set(places.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        MAINS[command](filled(words, places, tmp_path))
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert ended.value.code == 2, said
    assert ": error: " in said[-1] and named in said[-1].partition(": error: ")[2], said
    assert sum("rror:" in line for line in said) == 1 and not any("Traceback" in line for line in said), said
    assert set(places.rglob("*")) == before


def test_there_are_enough():
    assert sum(map(len, CASES.values())) >= 200
    assert all(cases for cases in CASES.values())
