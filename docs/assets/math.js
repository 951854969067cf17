// MathJax reads what arithmatex marks, draws with SVG, and loads nothing more
window.MathJax = {
  loader: { load: [] },
  tex: {
    inlineMath: [["\\(", "\\)"]],
    displayMath: [["\\[", "\\]"]],
    processEscapes: true,
    processEnvironments: true,
  },
  svg: { fontCache: "global" },
  options: {
    ignoreHtmlClass: ".*",
    processHtmlClass: "arithmatex|md-ellipsis", // the second: headings in the table of contents
    enableMenu: false,
  },
};
