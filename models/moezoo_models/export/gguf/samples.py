"""Text by which two tokenizers are compared: code, numbers, spaces, and many scripts."""

SAMPLES = (
    "The quick brown fox doesn't jump; it's LAZY, they'll say: 'I'm sure we've seen'd re'd.",
    "  two spaces,   three,\tone tab,\t\ttwo,\n one line \n\n  two lines \r\n\r\nand \r ones  ",
    "0 1 12 123 1234 12345 3.14159 1,234,567 0x7fff 1e-5 ½ ² ٣ Ⅷ v2.0-rc1 99% #42 @home",
    'def f(x: int = 3) -> str:\n    """Doc."""\n    if x != 0 and y[i] >= {"a": 1}["a"]:\n'
    "        return f'{x!r}'\n\n\nclass A(B):\n\tpass  # comment\n",
    "Füße, café, naïve, Ærøskøbing, Łódź, İstanbul, ĳ, ß, ﬁ, Größe 5 €, £3, ¥, ¿qué?, «oui», „ja“",
    "Привет, мир! Ελληνικά κείμενο. שלום עולם. مرحبا بالعالم. हिन्दी में पाठ। ภาษาไทย ქართული",
    "中文文本，没有空格。日本語のテキスト、カタカナ。한국어 텍스트입니다. 𠮷野家",
    "emoji 😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ✊🏽 ❤️ and symbols ∀x∈ℝ: ⌈x⌉ ≥ x → ∞ … — – ‘’ “” • ™ ©",
    "e\u0301 a\u0308 o\u0302\u0323 \u00a0nbsp\u2003em\u3000ideographic\u200bzero\u2028line\ufeffb",
    "https://example.org/a/b?c=d&e=%20#f user.name+tag@mail.co $HOME/.config *.py <|end|> </s>",
    "aaaaaaaaaaaaaaaa !!!!!!!!!! ---------- ========== ~~~~ .......... ____ 'S 'T 'RE 'VE 'M 'D",
    "\\begin{align} x^2 + y_1 &= \\frac{a}{b} \\\\ \\end{align} | a | b |\n|---|:-:|\n| 1 | 2 |\n",
)
"""Text in which pre-tokenizers that are alike differ."""
