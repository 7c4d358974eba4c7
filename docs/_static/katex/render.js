// Typeset every formula of the page; where scripts are off, its TeX stays readable.
document.querySelectorAll(".math[data-tex]").forEach((place) => {
  katex.render(place.dataset.tex, place, { displayMode: place.tagName === "DIV", throwOnError: false, strict: false });
});
