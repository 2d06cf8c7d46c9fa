// CLIP's byte-level BPE, of the tokenizer.json that `dte export --onnx` writes, and prompts with
// a place for v*: `PromptEncoder.tokenize` and `plain` of dte_lab/tokens.py.

const PIECES = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;

function byteLetters() {  // byte -> the letter that stands for it
  const letters = [];
  let extra = 256;
  for (let b = 0; b < 256; b++) {
    const shown = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    letters.push(String.fromCodePoint(shown ? b : extra++));
  }
  return letters;
}

const LETTERS = byteLetters();

export class Tokenizer {
  /** file: what tokenizer.json holds; tokens: of model.json. */
  constructor(file, tokens) {
    this.vocabulary = new Map(Object.entries(file.model.vocab));
    this.ranks = new Map(file.model.merges.map((pair, rank) => [
      Array.isArray(pair) ? pair.join(" ") : pair, rank,
    ]));
    this.unknown = this.vocabulary.get(file.model.unk_token);
    this.special = new Map(file.added_tokens.map((t) => [t.content, t.id]));
    this.tokens = tokens;
  }

  /** Token ids of plain text, without begin and end. */
  ids(text) {
    const escaped = [...this.special.keys()].map((t) => t.replace(/[^\w]/g, "\\$&"));
    const parts = text.split(new RegExp(`(${escaped.join("|")})`));
    return parts.flatMap((part) => this.special.has(part) ? [this.special.get(part)] : this.bpe(part));
  }

  bpe(text) {
    const spaced = text.normalize("NFC").replace(/\p{White_Space}+/gu, " ");
    const lower = Array.from(spaced, (c) => c.toLowerCase()).join("");
    return (lower.match(PIECES) ?? []).flatMap((piece) => this.word(piece));
  }

  word(piece) {
    const parts = Array.from(new TextEncoder().encode(piece), (b) => LETTERS[b]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    return parts.map((part) => this.vocabulary.get(part) ?? this.unknown);
  }

  /** {ids, slots, cut}: a prompt for the text graph. Slots are 0 where v* goes, else -1. */
  prompt(text) {
    const { length, bos, eos, pad, placeholder, placeholder_id: any } = this.tokens;
    const ids = [], slots = [];
    text.split(placeholder).forEach((part, i) => {
      const piece = this.ids(part);
      ids.push(...(i ? [any] : []), ...piece);
      slots.push(...(i ? [0] : []), ...piece.map(() => -1));
    });
    const cut = Math.max(0, ids.length - (length - 2));
    const row = [bos, ...ids.slice(0, length - 2), eos], where = [-1, ...slots.slice(0, length - 2)];
    while (row.length < length) row.push(pad);
    while (where.length < length) where.push(-1);
    return { ids: Int32Array.from(row), slots: Int32Array.from(where), cut };
  }
}
