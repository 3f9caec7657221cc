"""Tokenizers: text survives the round trip, tables survive the disk."""

import json
import pickle
import shutil
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import pytest

from u2moe_jax.text import tokenizer

_WORDS = ['THE', 'CAT', 'SAT', 'ON', 'MAT', "IT'S", 'A', 'DOG', 'HILL', 'RAN']
_ENGLISH = [' '.join(_WORDS[i:] + _WORDS[:i]) for i in range(len(_WORDS))]
_CHINESE = ['甚至出现交易', '你好世界', '广州市房地产']
_SPECIAL = ('<blank>', '<unk>', '<sos/eos>')


@pytest.fixture(scope='module')
def bpe():
  return tokenizer.train_bpe(_ENGLISH + _CHINESE, 60)


def _char():
  return tokenizer.build_char_tokenizer(_ENGLISH + _CHINESE)


def _write(folder, content):
  (folder / 'units.txt').write_bytes(content.encode('utf-8'))
  return folder


def _sentences(alphabet):
  words = st.text(alphabet=alphabet, min_size=1, max_size=6)
  return st.lists(words, max_size=6).map(' '.join)


@hypothesis.settings(deadline=None)
@hypothesis.given(_sentences("ACDEGHILMNORST'甚至出现"))
def test_characters_survive_the_round_trip(text):
  tokens = _char()
  assert tokens.decode(tokens.encode(text)) == text
  assert tokens.unknown_characters(text) == []


@hypothesis.settings(
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(text=_sentences("ACDEGHILMNORST'"))
def test_pieces_survive_the_round_trip(bpe, text):
  assert bpe.decode(bpe.encode(text)) == text
  assert bpe.unknown_characters(text) == []


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(alphabet=st.characters(exclude_categories=['Cs'])))
def test_bytes_survive_the_round_trip_whatever_the_text(text):
  tokens = tokenizer.ByteTokenizer()
  clean = ' '.join(text.split())
  assert tokens.decode(tokens.encode(text)) == clean
  assert tokens.unknown_characters(text) == []


def test_an_unknown_character_does_not_survive():
  tokens = _char()
  ids = tokens.encode('CAT Z CAT')
  assert ids.count(tokens.special.unk) == 1
  assert tokens.decode(ids) == 'CAT ⁇ CAT'
  assert tokens.unknown_characters('QZ CAT Z们') == ['Q', 'Z', '们']


def test_an_unknown_character_does_not_survive_in_pieces(bpe):
  assert bpe.special.unk in bpe.encode('CAT Z')
  assert '⁇' in bpe.decode(bpe.encode('CAT Z'))
  assert bpe.unknown_characters('QZ CAT Z们') == ['Q', 'Z', '们']


def test_whitespace_is_single_and_inside():
  tokens = _char()
  assert tokens.encode('  THE\t CAT\n') == tokens.encode('THE CAT')
  assert tokens.encode(' ') == []


def test_a_table_without_a_space_does_not_know_it():
  tokens = tokenizer.build_char_tokenizer(_CHINESE)
  assert tokens.unknown_characters('你 好') == [' ']


def test_decoding_leaves_out_what_is_not_text():
  tokens = _char()
  special = tokens.special
  ids = tokens.encode('CAT')
  framed = [special.sos, special.blank, *ids, special.blank, special.eos]
  assert tokens.decode(framed) == 'CAT'


@pytest.mark.parametrize('index', [-1, 10_000])
def test_an_id_outside_the_table_is_refused(index):
  with pytest.raises(ValueError, match='outside the table'):
    _char().decode([index])


def test_new_tables_have_the_order_of_the_recipes(bpe):
  for tokens in (_char(), bpe, tokenizer.ByteTokenizer()):
    assert tokens.tokens[:3] == _SPECIAL
    assert list(tokens.tokens[3:]) == sorted(tokens.tokens[3:])
    assert tokens.special == tokenizer.SpecialIds(0, 1, 2, 2)
    assert tokens.vocab_size == len(tokens.tokens)


def test_a_character_table_holds_the_characters():
  tokens = tokenizer.build_char_tokenizer(['BA', ' A  C '])
  assert tokens.tokens == (*_SPECIAL, 'A', 'B', 'C', '▁')


def test_a_byte_table_has_259_tokens():
  tokens = tokenizer.ByteTokenizer()
  assert tokens.vocab_size == 259
  assert tokens.encode('A') == [3 + 0x41]
  assert len(tokens.encode('好')) == 3


def test_half_a_character_still_decodes():
  tokens = tokenizer.ByteTokenizer()
  assert tokens.decode(tokens.encode('A好')[:-1]) == 'A\ufffd'


def test_training_keeps_to_its_size_and_repeats():
  first, again = (
    tokenizer.train_bpe(_ENGLISH, 40, model_type='bpe') for _ in range(2)
  )
  assert first.vocab_size == 40
  assert first.tokens == again.tokens
  assert max(len(token) for token in first.tokens[3:]) > 1


def test_chinese_characters_are_tokens_of_their_own(bpe):
  ids = bpe.encode('你好 THE 世界')
  pieces = [bpe.tokens[i] for i in ids]
  assert pieces[:2] == ['你', '好']
  assert pieces[-2:] == ['世', '界']
  assert bpe.decode(ids) == '你好 THE世界'


def test_training_on_too_little_says_so():
  with pytest.raises(ValueError, match='vocab_size'):
    tokenizer.train_bpe(_ENGLISH, 5)
  with pytest.raises(ValueError, match='no text'):
    tokenizer.train_bpe(_CHINESE, 50)


def test_capitals_are_made_where_asked_for():
  tokens = tokenizer.train_bpe(['the cat sat'] * 3, 20, uppercase=True)
  assert tokens.decode(tokens.encode('the cat')) == 'THE CAT'


@pytest.mark.parametrize('kind', ['char', 'bpe', 'bytes'])
def test_a_saved_folder_gives_back_the_tokenizer(tmp_path, bpe, kind):
  made = {'char': _char(), 'bpe': bpe, 'bytes': tokenizer.ByteTokenizer()}
  before = made[kind]
  before.save(tmp_path / 'tokens')
  after = tokenizer.load(tmp_path / 'tokens')
  assert type(after) is type(before)
  assert after.tokens == before.tokens
  assert after.special == before.special
  assert after.encode(_ENGLISH[3]) == before.encode(_ENGLISH[3])


def test_a_data_worker_can_be_sent_a_tokenizer(bpe):
  for tokens in (_char(), bpe, tokenizer.ByteTokenizer()):
    again = pickle.loads(pickle.dumps(tokens))
    assert again.encode(_ENGLISH[3]) == tokens.encode(_ENGLISH[3])


def test_a_wenet_folder_with_pieces_means_capitals(tmp_path, bpe):
  bpe.save(tmp_path)
  (tmp_path / 'tokenizer.json').unlink()
  loaded = tokenizer.load(tmp_path)
  assert loaded.kind == 'bpe'
  assert loaded.encode('the cat') == bpe.encode('THE CAT')
  assert loaded.encode('the cat') != bpe.encode('the cat')


@pytest.mark.parametrize(
  ('symbols', 'expected'),
  [
    (['<blank>', '<unk>', '<sos/eos>', 'A'], (0, 1, 2, 2)),
    (['<blank>', '<unk>', 'A', 'B', '<sos/eos>'], (0, 1, 4, 4)),
    (['<blank>', '<unk>', '<sos>', '<eos>', 'A'], (0, 1, 2, 3)),
    (['<blank>', '<unk>', 'A', 'B'], (0, 1, 3, 3)),
    (['<blank>', 'A', '<sos/eos>'], (0, -1, 2, 2)),
    (['<unk>', '<sos/eos>', 'A', '<blank>'], (3, 0, 1, 1)),
  ],
)
def test_special_ids_are_found_by_name(tmp_path, symbols, expected):
  lines = [f'{token} {index}\n' for index, token in enumerate(symbols)]
  loaded = tokenizer.load(_write(tmp_path, ''.join(lines)))
  assert loaded.kind == 'char'
  assert loaded.tokens == tuple(symbols)
  assert loaded.special == tokenizer.SpecialIds(*expected)


def test_without_an_unknown_token_unknown_text_is_left_out():
  tokens = tokenizer.CharTokenizer(['<blank>', 'A', '<sos/eos>'])
  assert tokens.encode('ABA') == [1, 1]


@pytest.mark.parametrize(
  'content',
  [
    '<blank> 0\r\n<unk> 1\r\nA 2\r\n',
    '\ufeff<blank> 0\n<unk> 1\nA 2\n',
    'A 2\n<unk> 1\n<blank> 0',
    '<blank>\t0\n<unk>  1\nA 2 \n\n',
  ],
)
def test_forms_of_a_table_that_are_alike(tmp_path, content):
  units = _write(tmp_path, content) / 'units.txt'
  assert tokenizer.read_units(units) == ['<blank>', '<unk>', 'A']


def test_unusual_spaces_may_be_tokens(tmp_path):
  units = _write(tmp_path, '<blank> 0\n\u3000 1\n\u2028 2\n') / 'units.txt'
  assert tokenizer.read_units(units) == ['<blank>', '\u3000', '\u2028']


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('<blank> 0\n<unk>\n', r'units\.txt:2: .*TOKEN ID'),
    ('<blank> 0\nA B 1\n', r'units\.txt:2: .*TOKEN ID'),
    ('<blank> 0\nA one\n', r'units\.txt:2: .*TOKEN ID'),
    ('<blank> 0\nA -1\n', r'units\.txt:2: .*TOKEN ID'),
    ('<blank> 0\n 1\n', r'units\.txt:2: .*TOKEN ID'),
    ('<blank> 0\nA 0\n', r"units\.txt:2: id 0 .*'<blank>'"),
    ('<blank> 0\nA 1\nA 2\n', r"units\.txt:3: token 'A' already has id 1"),
    ('<blank> 0\nA 2\n', r'units\.txt: .*none with id 1'),
    ('\n', r'units\.txt: no tokens'),
  ],
)
def test_a_malformed_table_is_named_with_its_line(tmp_path, content, message):
  with pytest.raises(ValueError, match=message):
    tokenizer.load(_write(tmp_path, content))


def test_a_table_that_is_not_utf8_is_named(tmp_path):
  (tmp_path / 'units.txt').write_bytes('<blank> 0\n好 1\n'.encode('gbk'))
  with pytest.raises(ValueError, match=r'units\.txt: not UTF-8'):
    tokenizer.load(tmp_path)


@pytest.mark.parametrize('content', ['{', '[]', '{"kind": "words"}', '{}'])
def test_malformed_settings_are_named(tmp_path, content):
  _write(tmp_path, '<blank> 0\n')
  (tmp_path / 'tokenizer.json').write_text(content)
  with pytest.raises(ValueError, match=r'tokenizer\.json'):
    tokenizer.load(tmp_path)


def test_a_model_that_is_none_is_named(tmp_path):
  _write(tmp_path, '<blank> 0\n')
  (tmp_path / 'bpe.model').write_bytes(b'no model')
  with pytest.raises(ValueError, match='sentencepiece') as caught:
    tokenizer.load(tmp_path)
  assert str(tmp_path) in str(caught.value)


def test_a_byte_table_needs_every_byte(tmp_path):
  _write(tmp_path, '<blank> 0\n<0x00> 1\n')
  (tmp_path / 'tokenizer.json').write_text(json.dumps({'kind': 'bytes'}))
  with pytest.raises(ValueError, match='0x01'):
    tokenizer.load(tmp_path)


def test_a_token_cannot_stand_twice():
  with pytest.raises(ValueError, match="'A' stands"):
    tokenizer.CharTokenizer(['<blank>', 'A', 'A'])


def test_importing_leaves_sentencepiece_alone():
  code = (
    'import sys; from u2moe_jax.text import tokenizer\n'
    "assert 'sentencepiece' not in sys.modules"
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_symbols_of_the_table_are_kept_whole():
  table = ['<blank>', '<unk>', '<sos/eos>', '<NOISE>', '{um}', '<', 'A', '▁']
  tokens = tokenizer.CharTokenizer(table)
  ids = tokens.encode('A <NOISE> {um}A')
  assert [tokens.tokens[i] for i in ids] == [
    'A', '▁', '<NOISE>', '▁', '{um}', 'A',
  ]  # fmt: skip
  assert tokens.decode(ids) == 'A <NOISE> {um}A'
  assert tokens.encode('<A') == [5, 6]
  # The negative control: a table without them spells them.
  plain = tokenizer.CharTokenizer(table[:3] + table[5:])
  assert plain.encode('{um}') == [plain.special.unk] * 4
  # What is special cannot be written.
  assert tokens.special.blank not in tokens.encode('<blank>')


@pytest.mark.parametrize(
  ('units', 'model'),
  [
    ('units.txt', 'bpe.model'),
    ('train_960_unigram5000_units.txt', 'train_960_unigram5000.model'),
    ('lang_char.txt', 'train.model'),
  ],
)
def test_wenets_names_are_found(tmp_path, bpe, units, model):
  bpe.save(tmp_path / 'ours')
  folder = tmp_path / 'lang_char'
  folder.mkdir()
  shutil.copy(tmp_path / 'ours' / 'units.txt', folder / units)
  shutil.copy(tmp_path / 'ours' / 'bpe.model', folder / model)
  for path in (folder, folder / units):
    loaded = tokenizer.load(path)
    assert loaded.kind == 'bpe'
    assert loaded.tokens == bpe.tokens
    assert loaded.encode(_ENGLISH[2]) == bpe.encode(_ENGLISH[2])
    assert loaded.decode(loaded.encode(_ENGLISH[2])) == _ENGLISH[2]
  (folder / model).unlink()
  assert tokenizer.load(folder).kind == 'char'


def test_a_choice_of_tables_is_refused_but_a_file_chooses(tmp_path):
  for name in ('a_units.txt', 'b_units.txt'):
    (tmp_path / name).write_text(f'<blank> 0\n<unk> 1\n{name[0]} 2\n')
  with pytest.raises(ValueError, match=r'a_units\.txt, b_units\.txt'):
    tokenizer.load(tmp_path)
  assert tokenizer.load(tmp_path / 'b_units.txt').tokens[2] == 'b'
