package cli

// YAMLOf is what --output yaml does to a document of JSON.
var YAMLOf = yamlOf
